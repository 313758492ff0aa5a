"""Masks of whole 128-token blocks, and what other people's kernels want to know of them."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from draftattn.kernels.block_mask import BlockMask

TILE = 128


class Span(NamedTuple):
    """Where block boundaries lie.

    Args:
        start: first token of the first block.
        end: token after the last block.
        whole: whether blocks hold 128 tokens each, the last one perhaps fewer, and start at token 0.
    """

    start: int
    end: int
    whole: bool


class TileLists(NamedTuple):
    """Key tiles of 128 tokens for each query tile: those that need a rule for single tokens, and those that do not.

    Counts are int32 ``[B | 1, H | 1, Q]``, ids int32 ``[B | 1, H | 1, Q, C]``, ascending and left-packed.
    """

    partial_counts: Tensor
    partial_ids: Tensor
    full_counts: Tensor
    full_ids: Tensor


_spans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def span(offsets: Tensor) -> Span:
    """The span of offsets ``[N + 1]``. The first call for a tensor waits for the device; the answer is kept with it.

    >>> span(torch.tensor([0, 128, 256, 300]))
    Span(start=0, end=300, whole=True)
    """
    if offsets not in _spans:
        ends = offsets.tolist()
        lengths = [end - start for start, end in pairwise(ends)]
        whole = ends[0] == 0 and bool(lengths) and set(lengths[:-1]) <= {TILE} and 0 < lengths[-1] <= TILE
        _spans[offsets] = Span(ends[0], ends[-1], whole)
    return _spans[offsets]


def reasons_against_even(block_mask: BlockMask, query_length: int, key_length: int) -> list[str]:
    """Every way in which a mask differs from whole 128-token blocks that cover both sequences; empty if in none."""
    reasons = []
    if block_mask.window is not None:
        reasons.append("it knows no sliding window")
    if block_mask.query_shifts is not None:
        reasons.append("it knows no query_shifts")
    if block_mask.key_offsets.ndim == 2:
        reasons.append("key_offsets differ by batch item")
    for name, size in (("query", block_mask.largest_query_block), ("key", block_mask.block_size)):
        if size != TILE:
            reasons.append(f"{name} blocks hold {size} tokens, not {TILE}")
    if reasons:
        return reasons
    for name, offsets, length in (
        ("query", block_mask.query_offsets, query_length),
        ("key", block_mask.key_offsets, key_length),
    ):
        found = span(offsets)
        if not found.whole or found.end != length:
            reasons.append(f"{name} blocks do not cover the sequence in steps of {TILE} tokens")
    return reasons


def tile_lists(block_mask: BlockMask, query_length: int, key_length: int, causal: bool) -> TileLists:
    """The tiles of a mask of whole 128-token blocks, on its device without a host sync.

    With ``causal``, ids ascend, so a row's list is: tiles that all its queries see whole, then at most two on the
    diagonal, then tiles that no query sees, which are left out.

    >>> from draftattn.kernels.block_mask import BlockMask
    >>> offsets = torch.tensor([0, 128, 256, 384], dtype=torch.int32)
    >>> mask = BlockMask.from_block_map(torch.ones(1, 1, 3, 3, dtype=torch.bool), offsets, offsets)
    >>> lists = tile_lists(mask, 384, 384, causal=True)
    >>> lists.full_counts.tolist(), lists.partial_counts.tolist(), lists.partial_ids[0, 0, :, 0].tolist()
    ([[[0, 1, 2]]], [[[1, 1, 1]]], [0, 1, 2])
    """
    counts, ids = block_mask.kv_num_blocks, block_mask.kv_indices
    if not causal:
        return TileLists(*_no_tiles(tuple(counts.shape), counts.device), counts, ids)
    shift = key_length - query_length
    used = torch.arange(ids.shape[-1], dtype=torch.int32, device=ids.device) < counts[..., None]
    first_query = torch.arange(counts.shape[-1], dtype=torch.int32, device=ids.device)[:, None] * TILE
    last_query = (first_query + TILE).clamp(max=query_length) - 1
    first_key = ids * TILE
    last_key = (first_key + TILE).clamp(max=key_length) - 1
    full = (used & (last_key <= first_query + shift)).sum(-1, dtype=torch.int32)
    seen = (used & (first_key <= last_query + shift)).sum(-1, dtype=torch.int32)
    diagonal = full[..., None] + torch.arange(2, device=ids.device)
    partial_ids = ids.gather(-1, diagonal.clamp(max=ids.shape[-1] - 1))
    return TileLists(seen - full, partial_ids, full, ids)


def for_each_head(lists: TileLists, heads: int) -> TileLists:
    """The same lists for kernels that take one pattern for all heads or one for each query head, not one a group."""
    mask_heads = lists.full_counts.shape[1]
    if mask_heads in (1, heads):
        return lists
    return TileLists(*(x.repeat_interleave(heads // mask_heads, dim=1) for x in lists))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def _no_tiles(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(*shape, 1, dtype=torch.int32, device=device)
    return ids[..., 0].contiguous(), ids
