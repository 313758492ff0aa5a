"""Loading a pipeline for generation, with everything checked before its weights are read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from draftattn.config import DraftConfig
from draftattn.errors import InputError


def check_generation(
    model: str,
    configs: Iterable[DraftConfig],
    *,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    has_image: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Checks that a model can make what is asked with every config, from its configuration files alone.

    Returns:
        The pipeline's index.

    Raises:
        InputError: if it cannot; names the value and what is allowed.
    """
    from draftattn.pipelines.video.checks import check_backend, check_request, component_config
    from draftattn.pipelines.video.pipeline import check_model

    index = check_model(model)
    needs_image = "ImageToVideo" in index["_class_name"]
    if needs_image != has_image:
        wants = "needs --image, its first frame" if needs_image else "takes no --image"
        raise InputError(f"{index['_class_name']} {wants}")
    transformer = component_config(model, "transformer")
    for config in configs:
        check_request(model, index, config, height=height, width=width, num_frames=num_frames)
        check_backend(config, transformer, dtype, device)
    return index


def load_pipeline(
    model: str, index: dict[str, Any], dtype: torch.dtype, device: torch.device, offload: str = "none"
) -> Any:
    """Loads a pipeline as its authors run it: the video autoencoder in float32 where the family needs that.

    Args:
        model: folder or repository.
        index: from `check_generation`.
        dtype: precision of the weights.
        device: where to run.
        offload: ``"none"``, or where weights wait on the CPU: ``"model"`` or ``"sequential"``.
    """
    from diffusers import DiffusionPipeline

    from draftattn.pipelines.video.adapter import adapter_for

    vae_dtype = torch.float32 if adapter_for(index["transformer"][1]).vae_in_float32 else dtype
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(
            model, dtype={"default": dtype, "vae": vae_dtype}, use_safetensors=True
        )
    except OSError as error:
        raise InputError(f"model {model!r} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def compile_blocks(pipe: Any) -> None:
    """Compiles the repeated blocks of every transformer of a pipeline; it happens when they first run.

    Draft attention may be turned on and off before and after. Sizes are not fixed: text of another length, of the next
    prompt or of the other guidance branch, compiles once more, and that graph then serves every length.
    """
    for transformer in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if transformer is not None:
            # the hooks by which diffusers shares tokens out to devices break the graph of the block that has them
            is_alone = getattr(transformer, "_parallel_config", None) is None
            transformer.compile_repeated_blocks(fullgraph=is_alone)


def num_attention_layers(model: str, index: dict[str, Any]) -> int:
    """Attention layers of a pipeline's transformer, from its configuration."""
    from draftattn.pipelines.video.adapter import adapter_for
    from draftattn.pipelines.video.checks import component_config

    return adapter_for(index["transformer"][1]).num_layers(component_config(model, "transformer"))


def default_arguments(index: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline's call takes where nothing is given: its size, frames, steps and guidance."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, index["_class_name"]).__call__).parameters
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    return {name: parameters[name].default for name in names if name in parameters}


def read_image(path: Path, width: int | None, height: int | None) -> Any:
    """The first frame for an image-to-video model, scaled to the video's size if that is given.

    Raises:
        InputError: if it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"image {str(path)!r} cannot be read: {error}") from error
    return image if width is None or height is None else image.resize((width, height))
