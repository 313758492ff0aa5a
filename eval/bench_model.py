"""Time of one denoising forward pass, dense and with draft attention."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from draftattn.config import DraftConfig
from draftattn.eval.architectures import build_transformer, example_inputs, latent_shape, read_architecture, token_grid
from draftattn.eval.environment import device_name, package_versions
from draftattn.kernels.backends import choose_backend
from draftattn.pipelines.video.checks import check_backend
from draftattn.pipelines.video.enable import disable, enable

# A forward that skips nothing may differ from dense by a few roundings of its dtype, relative to the output.
GATE = {
    torch.float32: 1e-5,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}


@torch.inference_mode()
def bench_model(
    model: str,
    *,
    height: int,
    width: int,
    num_frames: int,
    config: DraftConfig,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Medians of dense and draft forward passes of one transformer, taken alternately.

    A correctness gate comes first: with sparsity 0 draft attention must equal dense attention.

    Args:
        model: an architecture, folder or repository; see ``build_transformer``.
        height: pixels.
        width: pixels.
        num_frames: frames.
        config: settings; the warm-up must be 0.
        repeats: timed passes of each kind, after one untimed.
        dtype: precision.
        device: where to run.
        on_progress: told what is being done.

    Returns:
        Figures with all that is needed to repeat them.

    Raises:
        RuntimeError: if the gate is red.
    """
    latents = latent_shape(model, height, width, num_frames)
    check_backend(config, read_architecture(model)[1], dtype, device)
    on_progress("building the transformer")
    transformer = build_transformer(model, dtype, device)
    arguments = example_inputs(transformer, latents, dtype, device)
    grid = token_grid(transformer, arguments)

    on_progress("checking that sparsity 0 equals dense")
    expected = transformer(**arguments)[0]
    enable(transformer, replace(config, sparsity=0.0))
    error = _relative_error(transformer(**arguments)[0], expected)
    allowed = GATE[dtype]
    if not error <= allowed:
        raise RuntimeError(f"sparsity 0 differs from dense by {error:.2e}, more than {allowed:.0e}; nothing is timed")

    dense_times: list[float] = []
    draft_times: list[float] = []
    mask_times: list[float] = []
    peaks: dict[str, float | None] = {}
    density = 1.0
    for i in range(repeats + 1):
        on_progress(f"timing pass {i} of {repeats}")
        disable(transformer)
        dense_seconds, peaks["dense"] = _timed(transformer, arguments, device)
        handle = enable(transformer, config)
        draft_seconds, peaks["draft"] = _timed(transformer, arguments, device)
        stats = handle.stats()
        if i > 0:
            dense_times.append(dense_seconds)
            draft_times.append(draft_seconds)
            mask_times.append(stats.mask_seconds)
        density = stats.density
    disable(transformer)

    dense, draft = median(dense_times), median(draft_times)
    return {
        "title": f"{model}, {height}×{width}×{num_frames}, {grid.num_tokens} tokens, "
        f"{str(dtype).removeprefix('torch.')}, {device_name(device)}",
        "model": model,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "grid": list(grid),
        "tokens": grid.num_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "settings": dataclasses.asdict(config),
        "kernel": _kernel(config, transformer, dtype, device),
        "gate": {"relative_error": error, "allowed": allowed},
        "dense": {"seconds": dense, "all_seconds": dense_times, "peak_memory_gib": peaks["dense"]},
        "draft": {
            "seconds": draft,
            "all_seconds": draft_times,
            "peak_memory_gib": peaks["draft"],
            "density": density,
            "mask_seconds": median(mask_times),
        },
        "speedup": dense / draft,
        "device": device_name(device),
        "versions": package_versions(),
    }


def _kernel(config: DraftConfig, transformer: Any, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that serves this model's attention."""
    head_dim = transformer.config.attention_head_dim
    example = torch.empty(1, 128, 1, head_dim, dtype=dtype, device=device)
    return choose_backend(config.backend, example, example, example)


def _timed(transformer: nn.Module, arguments: dict[str, Any], device: torch.device) -> tuple[float, float | None]:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    transformer(**arguments)
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
