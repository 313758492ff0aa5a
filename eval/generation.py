"""Generating a video with the clock running."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """A generated video and the time it took.

    Args:
        video: ``[N, C, H, W]``, values in [0, 1], float32 on the CPU.
        seconds: the whole call: text encoder, denoising, decoding.
        step_seconds: each denoising step, all guidance branches included.
        decode_seconds: from the last step to the decoded frames.
    """

    video: Tensor
    seconds: float
    step_seconds: tuple[float, ...]
    decode_seconds: float

    def median_step(self, first: int = 0) -> float:
        """Median seconds of the steps from ``first`` on; the first step of a run is left out where others exist."""
        chosen = self.step_seconds[max(first, 1) :] or self.step_seconds[first:] or self.step_seconds
        return median(chosen)


def generate(
    pipeline: Any,
    *,
    seed: int,
    on_step: Callable[[], None] | None = None,
    on_decode: Callable[[], None] | None = None,
    **arguments: Any,
) -> Generation:
    """Runs a diffusers video pipeline once.

    Args:
        pipeline: any pipeline with ``callback_on_step_end`` whose output has ``frames``.
        seed: seed of a CPU generator, so that every device starts from the same noise.
        on_step: called after every denoising step.
        on_decode: called when the last step is done and decoding begins.
        **arguments: what the pipeline's call takes (one prompt).
    """
    marks: list[float] = []
    device = torch.device(pipeline._execution_device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before_denoiser(module: Any, args: Any) -> None:
        del module, args
        if not marks:
            marks.append(now())

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del timestep
        marks.append(now())
        if on_step is not None:
            on_step()
        if on_decode is not None and step == pipe.num_timesteps - 1:
            on_decode()
        return tensors

    first = pipeline.transformer if pipeline.transformer is not None else pipeline.transformer_2
    handle = first.register_forward_pre_hook(before_denoiser)
    try:
        start = now()
        frames = pipeline(
            **arguments,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            callback_on_step_end=after_step,
        ).frames[0]
        end = now()
    finally:
        handle.remove()
    return Generation(
        video=frames.float().cpu(),
        seconds=end - start,
        step_seconds=tuple(end - start for start, end in pairwise(marks)),
        decode_seconds=end - marks[-1],
    )
