"""Copying queries to the places of their pairs, and cutting the pairs of every chunk into blocks, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import contiguous_last

_INTEGERS = ["num_segments", "num_blocks", "num_chunks", "blocks_per_chunk", "blocks_per_unit", "stride_starts"]


@triton.jit(do_not_specialize=["kv_heads", "num_rows"])
def gather_kernel(
    p_q, p_place, p_packed, stride_qb, stride_qn, stride_qh, kv_heads, num_rows,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Reads BLOCK_R rows of a key head once, and writes them to all their places."""
    i_u = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_rows
    o_d = tl.arange(0, BLOCK_D)
    m_d = m_r[:, None] & (o_d < D)[None, :]
    o_h = (i_u % kv_heads) * GROUP + o_r % GROUP
    p_rows = p_q + (i_u // kv_heads) * stride_qb + (o_r // GROUP).to(tl.int64) * stride_qn + o_h * stride_qh
    b_q = tl.load(p_rows[:, None] + o_d[None, :], mask=m_d, other=0.0)
    p_place += i_u * SLOTS * num_rows + o_r
    for _ in range(SLOTS):
        o_place = tl.load(p_place, mask=m_r, other=0).to(tl.int64)
        tl.store(p_packed + o_place[:, None] * D + o_d[None, :], b_q, mask=m_d)
        p_place += num_rows


@triton.jit(do_not_specialize=_INTEGERS)
def lists_kernel(
    p_starts, p_offsets, p_counts, p_ids, stride_starts, num_segments, num_blocks, num_chunks,
    blocks_per_chunk, blocks_per_unit, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The query blocks of one chunk per program; the last also writes the surplus ones."""
    i_s = tl.program_id(0)
    before = 0
    for first in range(0, i_s, BLOCK):
        o_s = first + tl.arange(0, BLOCK)
        p_start = p_starts + o_s.to(tl.int64) * stride_starts
        b_start = tl.load(p_start, mask=o_s < i_s, other=0)
        b_end = tl.load(p_start + stride_starts, mask=o_s < i_s, other=0)
        before += tl.sum((b_end - b_start + (BLOCK_SIZE - 1)) // BLOCK_SIZE, 0)
    p_starts += i_s.to(tl.int64) * stride_starts
    start = tl.load(p_starts)
    end = tl.load(p_starts + stride_starts)
    is_last = (i_s == num_segments - 1).to(tl.int32)
    count = tl.where(is_last > 0, num_blocks - before, (end - start + (BLOCK_SIZE - 1)) // BLOCK_SIZE)
    i_k = (i_s // num_chunks) * blocks_per_unit + (i_s % num_chunks) * blocks_per_chunk
    for first in range(0, count + is_last, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        # the last boundary ends the last block
        b_offset = tl.minimum(start + o_b * BLOCK_SIZE, end)
        tl.store(p_offsets + before + o_b, b_offset, mask=o_b < count + is_last)
        tl.store(p_counts + before + o_b, blocks_per_chunk + tl.zeros_like(o_b), mask=o_b < count)
        p_list = p_ids + (before + o_b).to(tl.int64) * blocks_per_chunk
        for i in range(0, blocks_per_chunk):
            tl.store(p_list + i, i_k + i + tl.zeros_like(o_b), mask=o_b < count)


def gather_queries(query: Tensor, place: Tensor) -> Tensor:
    """See ``draftattn.kernels.gathered_queries.gather_queries``."""
    batch, kv_heads, slots, length, group = place.shape
    query, head_dim = contiguous_last(query), query.shape[-1]
    packed = torch.empty(place.numel(), head_dim, dtype=query.dtype, device=query.device)
    if packed.numel() == 0:
        return packed
    block_d = triton.next_power_of_2(head_dim)
    # four vectors of 16 bytes a thread
    block_r = max(1, 8192 // (block_d * query.element_size()))
    with torch.cuda.device_of(query):
        gather_kernel[(triton.cdiv(length * group, block_r), batch * kv_heads)](
            query, place.contiguous(), packed, *query.stride()[:3], kv_heads, length * group,
            GROUP=group, D=head_dim, BLOCK_D=block_d, SLOTS=slots, BLOCK_R=block_r, num_warps=4,
        )  # fmt: skip
    return packed


def gathered_lists(
    cu_seqlens: Tensor, num_pairs: int, num_chunks: int, blocks_per_chunk: int, blocks_per_unit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``draftattn.kernels.gathered_queries.gathered_lists_reference``."""
    num_segments = len(cu_seqlens) - 1
    num_blocks = num_pairs // 128 + num_segments
    offsets = torch.empty(num_blocks + 1, dtype=torch.int32, device=cu_seqlens.device)
    counts = torch.empty(num_blocks, dtype=torch.int32, device=cu_seqlens.device)
    ids = torch.empty(num_blocks, blocks_per_chunk, dtype=torch.int32, device=cu_seqlens.device)
    with torch.cuda.device_of(cu_seqlens):
        lists_kernel[(num_segments,)](
            cu_seqlens, offsets, counts, ids, cu_seqlens.stride(0), num_segments, num_blocks, num_chunks,
            blocks_per_chunk, blocks_per_unit, BLOCK_SIZE=128, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return offsets, counts, ids
