"""What stands before and after the denoising steps of a run: text encoding and decoding, measured."""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from draftattn.eval.architectures import ARCHITECTURES, Architecture, TextEncoder
from draftattn.eval.random_models import PROMPT_TOKENS, build_text_encoder, build_vae
from draftattn.pipelines.video.adapter import adapter_for

REPEATS = 3
WARM_FRAMES = 2  # latent frames of the untimed decode


@torch.inference_mode()
def measure_stages(
    model: str,
    latents: tuple[int, ...],
    *,
    guidance: bool,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Time and peak memory of text encoding and of decoding, with nothing else on the device.

    Args:
        model: a published architecture, whose parts get random weights, or a folder or repository.
        latents: shape of the transformer's input, from ``latent_shape``.
        guidance: whether a negative prompt is encoded too.
        dtype: precision; the autoencoder has float32 where the model's authors ask for that.
        device: where to run.
        on_progress: told what is being done.

    Returns:
        ``text``: seconds in all and of each encoder. ``decode``: seconds, whether in tiles, dtype. Both with the peak
        memory in GiB (None on a CPU). What could not run has an ``error`` in place of its seconds.
    """
    if model in ARCHITECTURES:
        architecture = ARCHITECTURES[model]
        on_progress("encoding text")
        text = _text(architecture, guidance, dtype, device)
        on_progress("decoding")
        decode = _decode(architecture, latents, dtype, device)
        return {"text": text, "decode": decode}
    return _stages_of_pipeline(model, latents, guidance, dtype, device, on_progress)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float | None]:
    """Seconds of a call until the device is done, and the peak memory in GiB (None on a CPU)."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None


def free(device: torch.device) -> None:
    """Gives a GPU's memory back that nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _text(architecture: Architecture, guidance: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    encoders = []
    for part in architecture.text_encoders:
        encoders.append(_encoder(part, guidance, dtype, device))
        free(device)
    peaks = [found["peak_memory_gib"] for found in encoders if found["peak_memory_gib"] is not None]
    return {
        "seconds": sum(found["seconds"] for found in encoders),
        "peak_memory_gib": max(peaks, default=None),
        "encoders": encoders,
    }


def _encoder(part: TextEncoder, guidance: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    encoder = build_text_encoder(part, dtype, device)
    prompts = 2 if guidance and part.has_negative else 1
    tokens = torch.randint(3, 200, (1, part.num_tokens), device=device)
    mask = (torch.arange(part.num_tokens, device=device) < min(PROMPT_TOKENS, part.num_tokens))[None].long()

    def call() -> None:
        for _ in range(prompts):
            encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True)

    call()
    found = [timed(call, device) for _ in range(REPEATS)]
    return {
        "name": part.class_name,
        "tokens": part.num_tokens,
        "prompts": prompts,
        "seconds": median(seconds for seconds, _ in found),
        "peak_memory_gib": found[-1][1],
    }


def _decode(
    architecture: Architecture, latents: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    in_float32 = adapter_for(architecture.transformer.class_name).vae_in_float32
    vae_dtype = torch.float32 if in_float32 else dtype
    vae = build_vae(architecture.vae, vae_dtype, device)
    return _timed_decode(vae, latents, vae_dtype, device, architecture.recipe.tiled_decode)


def _timed_decode(
    vae: Any, latents: tuple[int, ...], dtype: torch.dtype, device: torch.device, tiled: bool
) -> dict[str, Any]:
    """One decode after one of two frames; if that does not fit into memory, in tiles."""
    channels = vae.config.get("z_dim") or vae.config.latent_channels
    batch, _, frames, height, width = latents
    x = torch.randn(batch, channels, frames, height, width, device=device, dtype=dtype)
    if tiled:
        vae.enable_tiling()
    described: dict[str, Any] = {"tiled": tiled, "dtype": str(dtype).removeprefix("torch.")}
    fits = True
    try:
        _decode_latents(vae, x[:, :, :WARM_FRAMES])
        seconds, peak = timed(lambda: _decode_latents(vae, x), device)
        described |= {"seconds": seconds, "peak_memory_gib": peak}
    except torch.OutOfMemoryError:
        fits = False
    # only here is nothing of the failed call alive any more
    free(device)
    if fits:
        return described
    if not tiled:
        return _timed_decode(vae, latents, dtype, device, tiled=True)
    return {**described, "error": "out of memory", "peak_memory_gib": None}


def _decode_latents(vae: Any, latents: Tensor) -> None:
    vae.decode(latents, return_dict=False)


def _stages_of_pipeline(
    model: str,
    latents: tuple[int, ...],
    guidance: bool,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    from draftattn.pipelines.video.pipeline import check_model

    index = check_model(model)
    vae_dtype = torch.float32 if adapter_for(index["transformer"][1]).vae_in_float32 else dtype
    dtypes = {"default": dtype, "vae": vae_dtype}
    on_progress("encoding text")
    text = _text_of_pipeline(_load_parts(model, index, dtypes, device, without="vae"), guidance, device)
    free(device)
    on_progress("decoding")
    vae = _load_parts(model, index, dtypes, device, without="text_encoder").vae
    return {"text": text, "decode": _timed_decode(vae, latents, vae_dtype, device, tiled=False)}


def _load_parts(model: str, index: dict[str, Any], dtypes: dict[str, Any], device: torch.device, without: str) -> Any:
    """A pipeline without its transformers and without the parts whose names begin with ``without``."""
    from diffusers import DiffusionPipeline

    left_out = {name: None for name in index if name.startswith(("transformer", without))}
    pipe: Any = DiffusionPipeline.from_pretrained(model, dtype=dtypes, use_safetensors=True, **left_out)
    return pipe.to(device)


def _text_of_pipeline(pipe: Any, guidance: bool, device: torch.device) -> dict[str, Any]:
    arguments: dict[str, Any] = {"prompt": "a cat walks on the grass, realistic", "device": device}
    if "do_classifier_free_guidance" in inspect.signature(pipe.encode_prompt).parameters:
        arguments["do_classifier_free_guidance"] = guidance
    pipe.encode_prompt(**arguments)
    found = [timed(lambda: pipe.encode_prompt(**arguments), device) for _ in range(REPEATS)]
    return {"seconds": median(seconds for seconds, _ in found), "peak_memory_gib": found[-1][1], "encoders": []}
