"""Queries in the order of the chunks they chose: attention to each chunk is then a run of ordinary blocks.

`draftattn.kernels.gathered_choice.choose_chunks` says what a pair is, and gives every pair its place.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.dispatch import triton_serves
from draftattn.kernels.varlen import varlen_offsets

_BLOCK_SIZE = 128


def gather_queries(query: Tensor, place: Tensor) -> Tensor:
    """Copies the query of every pair to its place. Differentiable; a query's gradients are summed in float32, in order.

    Args:
        query: ``[B, N, H, D]``, any strides with a contiguous last dimension.
        place: int32 ``[B, H_kv, P, N, G]``, every number below their count once.

    Returns:
        ``[B * H_kv * P * N * G, D]``.

    >>> place = torch.tensor([1, 0, 2], dtype=torch.int32).view(1, 1, 1, 3, 1)
    >>> gather_queries(torch.tensor([5.0, 6.0, 7.0]).view(1, 3, 1, 1), place).flatten().tolist()
    [6.0, 5.0, 7.0]
    """
    if torch.is_grad_enabled() and query.requires_grad:
        return _Gather.apply(query, place)
    return _gather(query, place)


class _Gather(torch.autograd.Function):
    # autograd's own gradient of a selection adds up in the queries' dtype, and on a GPU in any order

    @staticmethod
    def forward(ctx: Any, query: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return _gather(query, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        batch, kv_heads, _, length, group = place.shape
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        # of each slot, as rows [B * N * H, D]
        of_slots = (gradient.index_select(0, x.transpose(1, 2).flatten()).to(dtype) for x in place.unbind(2))
        total = functools.reduce(torch.add, of_slots)
        return total.to(gradient.dtype).view(batch, length, kv_heads * group, gradient.shape[-1]), None


def _gather(query: Tensor, place: Tensor) -> Tensor:
    if not triton_serves(query):
        return gather_queries_reference(query, place)
    from draftattn.kernels import triton_gathered_queries

    return triton_gathered_queries.gather_queries(query, place)


def gathered_mask(
    cu_seqlens: Tensor, num_pairs: int, num_chunks: int, blocks_per_chunk: int, key_offsets: Tensor
) -> BlockMask:
    """The mask with which ordered pairs attend to the keys of their chunk. Never waits for the device.

    Args:
        cu_seqlens: int32 ``[U * C + 1]``, where the pairs of each chunk begin; U batch items times key heads.
        num_pairs: how many pairs there are, ``cu_seqlens[-1]``.
        num_chunks: C.
        blocks_per_chunk: key blocks of each chunk; they follow each other.
        key_offsets: int32 ``[K + 1]``, boundaries of the key blocks of all batch items and heads, one after the other.
            Each has its C chunks first, and may have other blocks after them.

    Returns:
        A mask for queries ``[1, num_pairs, 1, D]``, of ``num_pairs // 128 + U * C`` query blocks, so many as there can
        be at most; surplus ones hold no query.

    >>> cu_seqlens, key_offsets = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 4, 8], dtype=torch.int32)
    >>> mask = gathered_mask(cu_seqlens, 3, 2, 1, key_offsets)
    >>> mask.query_offsets.tolist(), mask.kv_indices.flatten().tolist()
    ([0, 1, 3], [0, 1])
    """
    units = (len(cu_seqlens) - 1) // num_chunks
    blocks_per_unit = (len(key_offsets) - 1) // units
    lists = gathered_lists_reference
    if triton_serves(cu_seqlens):
        from draftattn.kernels import triton_gathered_queries

        lists = triton_gathered_queries.gathered_lists
    query_offsets, counts, ids = lists(cu_seqlens, num_pairs, num_chunks, blocks_per_chunk, blocks_per_unit)
    return BlockMask(counts[None, None], ids[None, None], query_offsets, key_offsets, _BLOCK_SIZE)


def gather_queries_reference(query: Tensor, place: Tensor) -> Tensor:
    """``gather_queries`` in plain torch."""
    batch, kv_heads, _, length, group = place.shape
    rows = query.unflatten(2, (kv_heads, group)).transpose(1, 2).reshape(-1, query.shape[-1])
    source = torch.arange(len(rows), device=place.device).view(batch, kv_heads, 1, length, group)
    row = torch.empty(place.numel(), dtype=torch.int64, device=place.device)
    row[place.flatten().long()] = source.expand(place.shape).flatten()
    return rows.index_select(0, row)


def gathered_lists_reference(
    cu_seqlens: Tensor, num_pairs: int, num_chunks: int, blocks_per_chunk: int, blocks_per_unit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Boundaries, lengths and lists of ``gathered_mask`` in plain torch."""
    query_offsets, segment = varlen_offsets(cu_seqlens.contiguous(), num_pairs, _BLOCK_SIZE)
    # surplus blocks take the last chunk's list
    segment = segment.clamp(max=len(cu_seqlens) - 2)
    first = segment // num_chunks * blocks_per_unit + segment % num_chunks * blocks_per_chunk
    ids = first[:, None] + torch.arange(blocks_per_chunk, dtype=torch.int32, device=first.device)
    return query_offsets, torch.full_like(first, blocks_per_chunk), ids
