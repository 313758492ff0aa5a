"""Loading language models: from a hub, a folder, or a GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from draftattn.errors import InputError


def load_language_model(source: str, *, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A causal language model of transformers in evaluation mode, and its tokenizer.

    Args:
        source: a repository id, a folder in transformers' layout, or a ``.gguf`` file, whose weights are dequantised.
        dtype: of the weights.
        device: where they go.

    Raises:
        InputError: if there is no such model, or a package that reads it is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
        tokenizer = AutoTokenizer.from_pretrained(where, **arguments)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **_dequantised(arguments))
    except (OSError, ValueError) as error:
        raise InputError(f"model {source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.eval().to(device=device), tokenizer


def _dequantised(arguments: dict[str, Any]) -> dict[str, Any]:
    if not arguments:
        return {}
    import transformers

    # transformers that knows the class asks for it; older ones always dequantise
    config_class = getattr(transformers, "GgufConfig", None)
    return arguments if config_class is None else {**arguments, "quantization_config": config_class(dequantize=True)}
