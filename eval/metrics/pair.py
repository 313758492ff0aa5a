"""What every metric asks of its two videos."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def as_unit_pair(video: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Two videos of one shape as float32 in [0, 1].

    Args:
        video: ``[N, C, H, W]``, floating in [0, 1] or uint8.
        reference: the same shape.

    Raises:
        ValueError: if the shapes differ or are not those of videos.
    """
    if video.shape != reference.shape or video.ndim != 4:
        raise ValueError(
            f"videos must have one shape [frames, channels, height, width]; got {list(video.shape)} and "
            f"{list(reference.shape)}"
        )
    return _as_unit(video), _as_unit(reference)


def _as_unit(video: Tensor) -> Tensor:
    return video.float() / 255 if video.dtype == torch.uint8 else video.float()


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions in whole float32: cuDNN's default on GPUs, TF32, keeps 10 bits and SSIM subtracts large numbers."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield
