"""Whether a pipeline can do what is asked, known before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.kernels.backends import reasons_against
from draftattn.kernels.dense import reasons_against_dense
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
    transformer = component_config(repo_or_folder, "transformer", **options)
    resolve_layers(config.dense_layers, adapter.num_layers(transformer))
    if height is None and width is None and num_frames is None:
        return
    check_size(
        adapter.size_multiples(component_config(repo_or_folder, "vae", **options), transformer),
        height,
        width,
        num_frames,
    )


def check_size(multiples: tuple[int, int], height: int | None, width: int | None, num_frames: int | None) -> None:
    """Checks a video size against what an adapter's ``size_multiples`` gave.

    Raises:
        InputError: if a side or the number of frames is not allowed.
    """
    side, frame_step = multiples
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < side or value % side):
            near = max(side, round(value / side) * side)
            raise InputError(f"{name} is {value}; this model takes multiples of {side}, such as {near}")
    if num_frames is not None and (num_frames < 1 or (num_frames - 1) % frame_step):
        near = max(0, round((num_frames - 1) / frame_step)) * frame_step + 1
        raise InputError(f"frames is {num_frames}; this model takes 1 plus a multiple of {frame_step}, such as {near}")


def check_backend(
    config: DraftConfig, transformer_config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Checks that the kernels asked for, of sparse and of dense attention, can serve a transformer.

    Raises:
        InputError: with every reason why it cannot.
    """
    head_dim = transformer_config.get("attention_head_dim", 128)
    example = torch.empty(1, 16, 1, head_dim, dtype=dtype, device=device)
    with torch.no_grad():
        if config.backend != "auto" and (reasons := reasons_against(config.backend, example, example, example)):
            raise InputError(f"backend {config.backend!r} cannot serve here: {'; '.join(reasons)}")
        if reasons := reasons_against_dense(config.dense_backend, example, example, example):
            raise InputError(f"dense_backend {config.dense_backend!r} cannot serve here: {'; '.join(reasons)}")


def component_config(repo_or_folder: str | Path, component: str, **options: Any) -> dict[str, Any]:
    """The config of one component of a pipeline.

    Raises:
        InputError: if there is none.
    """
    try:
        config = _AnyModel.load_config(str(repo_or_folder), subfolder=component, **options)
    except OSError as error:
        raise InputError(f"model {str(repo_or_folder)!r} has no readable {component}/config.json") from error
    assert isinstance(config, dict)
    return config


class _AnyModel(ConfigMixin):
    """Reads a component's config without its class, which older or newer diffusers may lack."""

    config_name = "config.json"  # type: ignore[assignment]
