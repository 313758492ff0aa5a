"""Block masks of sliding windows with sinks, united with selected blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from draftattn.kernels.block_mask import BlockMask, SlidingWindow


def sliding_window_mask(
    query_offsets: Tensor,
    key_offsets: Tensor,
    size: int,
    *,
    sink: int = 0,
    selected: Tensor | None = None,
    query_shifts: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
    block_size: int = 128,
    query_block_size: int | None = None,
    max_blocks_per_row: int | None = None,
) -> BlockMask:
    """The blocks that a sliding window and the sinks touch, and selected blocks, which are computed whole.

    With the mask's rule for single tokens (`SlidingWindow`) the result is exact to the token. Lists hold no block that
    a query block does not see. Built on the device of the offsets, without a host sync.

    Args:
        query_offsets: int32 ``[Q + 1]``.
        key_offsets: int32 ``[K + 1]`` or ``[B, K + 1]``.
        size: keys of the window: a query at key position ``p`` sees the keys ``j > p - size``.
        sink: leading keys of the sequence that every query sees.
        selected: bool ``[B | 1, H | 1, Q, K]``: blocks to compute whole besides, except for what ``causal`` hides.
        query_shifts: int32 ``[Q]`` or ``[B, Q]``, see `BlockMask`. None: the last query of the blocks stands at the
            last key of the blocks, of each batch item.
        starts: int32 ``[Q]`` or ``[B, Q]``: the first key of each query block's sequence; earlier blocks belong to
            others. None: the first key of the blocks.
        causal: whether the attention call will be causal. Blocks wholly in the future are left out then.
        block_size: the most tokens any block holds.
        query_block_size: the most tokens any query block holds, if fewer.
        max_blocks_per_row: an upper bound on the blocks of a row, if known: the lists are then only that long.

    Returns:
        A mask with ``window`` and ``query_shifts``; of batch size 1 unless offsets, shifts, starts or ``selected`` are
        per item.

    Raises:
        ValueError: if sizes are out of range or shapes do not fit together.

    >>> offsets = torch.arange(0, 7, dtype=torch.int32) * 16
    >>> mask = sliding_window_mask(offsets, offsets, 20, sink=4, block_size=16)
    >>> mask.block_map[0, 0].int().tolist()[4:]
    [[1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]]
    """
    if size < 1 or sink < 0:
        raise ValueError(f"window has size {size} and sink {sink}; allowed are size >= 1, sink >= 0")
    shifts = aligned_to_the_end(query_offsets, key_offsets) if query_shifts is None else query_shifts
    touched = visible_blocks(query_offsets, key_offsets, shifts, starts, causal=causal, size=size, sink=sink)
    block_map = touched
    if selected is not None:
        if selected.ndim != 4 or selected.dtype != torch.bool or selected.shape[2:] != touched.shape[2:]:
            raise ValueError(
                f"selected must be bool [B, H, {touched.shape[2]}, {touched.shape[3]}]; got {selected.dtype} "
                f"{list(selected.shape)}"
            )
        selected = selected & visible_blocks(query_offsets, key_offsets, shifts, starts, causal=causal)
        block_map = touched | selected
    mask = BlockMask.from_block_map(
        block_map,
        query_offsets,
        key_offsets,
        block_size,
        max_blocks_per_row,
        query_block_size=query_block_size,
        query_shifts=shifts,
    )
    whole = None
    if selected is not None:
        whole = selected.expand(block_map.shape).gather(-1, mask.kv_indices.long())
    return replace(mask, window=SlidingWindow(size, sink, whole, starts))


def visible_blocks(
    query_offsets: Tensor,
    key_offsets: Tensor,
    query_shifts: Tensor,
    starts: Tensor | None = None,
    *,
    causal: bool,
    size: int | None = None,
    sink: int = 0,
) -> Tensor:
    """Which key blocks hold a key that some query of a query block sees, bool ``[B | 1, 1, Q, K]``.

    Args:
        query_offsets: int32 ``[Q + 1]``.
        key_offsets: int32 ``[K + 1]`` or ``[B, K + 1]``.
        query_shifts: int32 ``[Q]`` or ``[B, Q]``: the query at index ``i`` stands at key position ``i + shift``.
        starts: int32 ``[Q]`` or ``[B, Q]``: the first key of each query block's sequence; earlier blocks are not seen.
        causal: keys past a query's position are not seen.
        size: a query at ``p`` sees only the keys ``j > p - size`` and the sinks; None for all.
        sink: leading keys of the sequence that every query sees.

    >>> offsets = torch.tensor([0, 4, 4, 8, 12], dtype=torch.int32)
    >>> visible_blocks(offsets, offsets, torch.zeros(4).int(), causal=True, size=4)[0, 0].int().tolist()
    [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]
    """
    # [B | 1, Q, 1] queries against [B | 1, 1, K] keys
    first = (torch.atleast_2d(query_shifts) + query_offsets[:-1])[..., None]
    last = (torch.atleast_2d(query_shifts) + query_offsets[1:] - 1)[..., None]
    key_offsets = torch.atleast_2d(key_offsets)[:, None]
    key_first, key_last = key_offsets[..., :-1], key_offsets[..., 1:] - 1
    visible = (key_first <= key_last) & (first <= last)
    if causal:
        visible = visible & (key_first <= last)
    start = key_first[..., :1] if starts is None else torch.atleast_2d(starts)[..., None]
    if starts is not None:
        visible = visible & (key_last >= start)
    if size is not None:
        visible = visible & ((key_last > first - size) | (key_first < start + sink))
    return visible[:, None]


def aligned_to_the_end(query_offsets: Tensor, key_offsets: Tensor) -> Tensor:
    """Shifts ``[Q]`` or ``[B, Q]`` that put the last query of the blocks at the last key of the blocks, of each item.

    >>> aligned_to_the_end(torch.tensor([0, 4, 6]), torch.tensor([0, 8, 10])).tolist()
    [4, 4]
    """
    shift = key_offsets[..., -1:] - query_offsets[-1]
    return shift.expand(*shift.shape[:-1], query_offsets.shape[0] - 1).contiguous()
