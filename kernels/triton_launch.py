"""What the launches of Triton kernels share: strides, and the limits of a GPU."""

from __future__ import annotations

import functools
from typing import TypeVar

import torch
import triton
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")


def contiguous_last(x: MaybeTensor) -> MaybeTensor:
    """The tensor itself where its last dimension is contiguous, else a copy; None stays None."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def shared_strides(x: Tensor | None, count: int) -> list[int]:
    """The first strides, 0 for dimensions of 1, which all batch items or heads share; zeros for None.

    >>> shared_strides(torch.empty(2, 1, 4, 3), 3)
    [12, 0, 3]
    """
    if x is None:
        return [0] * count
    return [0 if size == 1 else stride for size, stride in zip(x.shape[:count], x.stride(), strict=False)]


def item_stride(x: Tensor | None) -> int:
    """The batch stride of ``[N]`` or ``[B, N]``, 0 where all items share the numbers."""
    return 0 if x is None or x.ndim == 1 else x.stride(0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter plays one with few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one program may use; the interpreter takes the tilings of a large GPU."""
    if device.type != "cuda":
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
