"""Loading language models: from a hub, a folder, or a GGUF file.

A source is a repository id, a folder in transformers' layout, or a ``.gguf`` file, whose weights are dequantised.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from draftattn.errors import InputError


def load_model(source: str, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model of transformers in evaluation mode.

    Args:
        source: where it is.
        dtype: of the weights.
        device: where they go.

    Raises:
        InputError: if there is no such model, or a package that reads it is missing.
    """
    from transformers import AutoModelForCausalLM

    with _readable(source) as (where, arguments):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **_dequantised(arguments))
    return model.eval().to(device=device)


def load_tokenizer(source: str) -> Any:
    """Its tokenizer, which takes a fraction of the model's time; raises as `load_model` does."""
    from transformers import AutoTokenizer

    with _readable(source) as (where, arguments):
        return AutoTokenizer.from_pretrained(where, **arguments)


def num_layers(source: str) -> int:
    """Layers of a model, from its configuration alone; raises as `load_model` does."""
    from transformers import AutoConfig

    with _readable(source) as (where, arguments):
        config = AutoConfig.from_pretrained(where, **arguments)
    return int(config.get_text_config(decoder=True).num_hidden_layers)


@contextlib.contextmanager
def _readable(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What transformers' ``from_pretrained`` takes for a source; what it then raises names the source."""
    where, arguments = source, {}
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model {source!r} is no file")
        if importlib.util.find_spec("gguf") is None:
            raise InputError("a GGUF file needs the package gguf: pip install gguf")
        where, arguments = str(path.parent), {"gguf_file": path.name}
    elif path.exists() and not (path / "config.json").is_file():
        raise InputError(f"model {source!r} is no folder with a config.json")
    try:
        yield where, arguments
    except (OSError, ValueError) as error:
        raise InputError(f"model {source!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def _dequantised(arguments: dict[str, Any]) -> dict[str, Any]:
    if not arguments:
        return {}
    import transformers

    # transformers that knows the class asks for it; older ones always dequantise
    config_class = getattr(transformers, "GgufConfig", None)
    return arguments if config_class is None else {**arguments, "quantization_config": config_class(dequantize=True)}
