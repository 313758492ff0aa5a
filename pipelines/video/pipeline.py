"""Loading a pipeline with draft attention in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.pipelines.video.adapter import adapter_for, supported_classes
from draftattn.pipelines.video.checks import check_request
from draftattn.pipelines.video.enable import enable
from draftattn.presets import resolve_config


class DraftAttentionPipeline:
    """Any supported diffusers pipeline with draft attention enabled.

    As with ``DiffusionPipeline``, `from_pretrained` gives an instance of the concrete class, such as ``WanPipeline``:
    calling, ``.to``, offloading, LoRA, callbacks and the progress bar are its own. ``pipe.draft`` holds the settings
    and statistics, ``draftattn.disable(pipe)`` turns it off.
    """

    @classmethod
    def from_pretrained(
        cls, repo_or_folder: str | Path, *, draft: DraftConfig | str | None = None, **kwargs: Any
    ) -> Any:
        """Loads a pipeline and enables draft attention on it.

        Args:
            repo_or_folder: a folder in diffusers' layout, or the id of a Hugging Face repository.
            draft: settings, the name of a preset, or None for the defaults.
            **kwargs: what ``DiffusionPipeline.from_pretrained`` takes (``dtype``, ``device_map``, ``revision``, …).

        Raises:
            InputError: if the folder does not exist or holds no pipeline, its transformer is not supported, or weights
                other than safetensors are asked for; found out before any weight is loaded.

        >>> pipe = DraftAttentionPipeline.from_pretrained("assets/tiny-wan", draft="fast")
        >>> type(pipe).__name__, pipe.draft.config.sparsity
        ('WanPipeline', 0.9)
        """
        config = resolve_config(draft)
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise InputError(f"use_safetensors is {kwargs['use_safetensors']!r}; only safetensors weights are loaded")
        options = {name: kwargs[name] for name in _CONFIG_OPTIONS if name in kwargs}
        index = check_model(repo_or_folder, **options)
        if "transformer" not in kwargs:
            check_request(repo_or_folder, index, config, **options)
        try:
            pipe = DiffusionPipeline.from_pretrained(str(repo_or_folder), **kwargs)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"model {str(repo_or_folder)!r} could not be loaded: {reason}") from error
        enable(pipe, config)
        return pipe


_CONFIG_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def check_model(repo_or_folder: str | Path, **options: Any) -> dict[str, Any]:
    """Reads the index of a pipeline and checks that draft attention can run on it.

    Args:
        repo_or_folder: a folder or the id of a Hugging Face repository.
        **options: where and how to look (``revision``, ``token``, ``cache_dir``, …).

    Returns:
        The index: component names with their library and class.

    Raises:
        InputError: see `DraftAttentionPipeline.from_pretrained`.
    """
    path = Path(repo_or_folder)
    if not path.is_dir():
        text = str(repo_or_folder)
        looks_like_repository = text.count("/") == 1 and not text.startswith((".", "/", "~")) and not path.exists()
        if not looks_like_repository:
            raise InputError(f"model {text!r} is not a folder; give one in diffusers' layout, or a repository id")
    elif not (path / "model_index.json").is_file():
        raise InputError(f"model folder {str(path)!r} has no model_index.json; it must be in diffusers' layout")
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(str(repo_or_folder), **options)
    except OSError as error:
        raise InputError(
            f"model {str(repo_or_folder)!r} is no folder here and could not be read from the Hugging Face hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    _, class_name = index.get("transformer") or (None, None)
    if class_name is None:
        raise InputError(
            f"{index.get('_class_name')} has no transformer; draft attention runs on pipelines with one of "
            f"{', '.join(supported_classes())}"
        )
    adapter_for(class_name)
    return index
