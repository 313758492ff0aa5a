"""Whether a pipeline can do what is asked, known before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ConfigMixin

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.pipelines.video.adapter import adapter_for, resolve_layers


def check_request(
    repo_or_folder: str | Path,
    index: dict[str, Any],
    config: DraftConfig,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    **options: Any,
) -> None:
    """Checks settings and a video size against the configs of a pipeline's transformer and VAE.

    Args:
        repo_or_folder: where the pipeline is.
        index: its index, from ``check_model``.
        config: the settings.
        height: pixels, or None for the pipeline's default.
        width: pixels, or None.
        num_frames: frames, or None.
        **options: where and how to look (``revision``, ``token``, …).

    Raises:
        InputError: if a dense layer does not exist, or the pipeline would refuse the size or round it to another;
            names what is allowed.
    """
    adapter = adapter_for(index["transformer"][1])
    transformer = _component_config(repo_or_folder, "transformer", **options)
    resolve_layers(config.dense_layers, adapter.num_layers(transformer))
    side, frame_step = adapter.size_multiples(_component_config(repo_or_folder, "vae", **options), transformer)
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < side or value % side):
            near = max(side, round(value / side) * side)
            raise InputError(f"{name} is {value}; this model takes multiples of {side}, such as {near}")
    if num_frames is not None and (num_frames < 1 or (num_frames - 1) % frame_step):
        near = max(0, round((num_frames - 1) / frame_step)) * frame_step + 1
        raise InputError(f"frames is {num_frames}; this model takes 1 plus a multiple of {frame_step}, such as {near}")


def _component_config(repo_or_folder: str | Path, component: str, **options: Any) -> dict[str, Any]:
    config = _AnyModel.load_config(str(repo_or_folder), subfolder=component, **options)
    assert isinstance(config, dict)
    return config


class _AnyModel(ConfigMixin):
    """Reads a component's config without its class, which older or newer diffusers may lack."""

    config_name = "config.json"  # type: ignore[assignment]
