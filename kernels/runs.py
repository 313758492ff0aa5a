"""Block masks whose rows are runs of neighbouring blocks, in memory and time linear in the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.block_mask import BlockMask, SlidingWindow


def mask_of_runs(
    first: Tensor,
    count: Tensor,
    longest: int,
    query_offsets: Tensor,
    key_offsets: Tensor,
    block_size: int = 128,
    *,
    query_shifts: Tensor | None = None,
    window: SlidingWindow | None = None,
) -> BlockMask:
    """The mask in which every query block attends to some consecutive key blocks.

    A map of all pairs of blocks, which other masks are made from, is never made. Never waits for the device.

    Args:
        first: int32 ``[Q]`` or ``[B, Q]``, the first key block of every query block.
        count: int32 like ``first``, how many key blocks there are; none below 1.
        longest: the most key blocks of any query block; a longer run is cut off.
        query_offsets: int32 ``[Q + 1]``.
        key_offsets: int32 ``[K + 1]`` or ``[B, K + 1]``.
        block_size: the most tokens any block holds.
        query_shifts: see `BlockMask`.
        window: see `BlockMask`.

    >>> offsets = torch.arange(5, dtype=torch.int32) * 16
    >>> first, count = torch.tensor([[0, 0, 1, 2], [1, 2, 2, 1]], dtype=torch.int32)
    >>> mask_of_runs(first, count, 2, offsets, offsets, 16).block_map[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]
    """
    longest = max(1, min(longest, key_offsets.shape[-1] - 1))
    first, count = (torch.atleast_2d(x)[:, None] for x in (first, count.clamp(0, longest)))
    place = torch.arange(longest, dtype=torch.int32, device=first.device)
    return BlockMask(
        count,
        torch.where(place < count[..., None], first[..., None] + place, 0),
        query_offsets,
        key_offsets,
        block_size,
        query_shifts=query_shifts,
        window=window,
    )
