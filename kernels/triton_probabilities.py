"""Attention probabilities reduced to blocks, in Triton: one product, no values."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import (
    contiguous_last,
    item_stride,
    num_multiprocessors,
    shared_memory,
    shared_strides,
)

if TYPE_CHECKING:
    from draftattn.kernels.block_mask import BlockMask

_LOG2_E = 1.4426950408889634
# numbers whose divisibility buys nothing: each would cost compilations
_ANY_VALUE = [
    *("query_length", "key_length", "num_query_blocks", "window_size", "window_sink", "chunks"),
    *(f"stride_{name}_{axis}" for name in ("ids", "whole") for axis in "bhq"),
    *("stride_counts_b", "stride_counts_h", "stride_key_offsets_b", "stride_shifts_b", "stride_starts_b"),
    *("stride_pb", "stride_ph", "stride_pq", "stride_pt"),
]


@triton.jit(do_not_specialize=_ANY_VALUE)
def block_probabilities_kernel(
    p_q, p_k, p_lse, p_out,
    p_counts, p_ids, p_query_offsets, p_key_offsets, p_shifts, p_whole, p_starts,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_lb, stride_lh, stride_ls,
    stride_pb, stride_ph, stride_pq, stride_pt,
    stride_counts_b, stride_counts_h,
    stride_ids_b, stride_ids_h, stride_ids_q,
    stride_key_offsets_b, stride_shifts_b,
    stride_whole_b, stride_whole_h, stride_whole_q,
    stride_starts_b, stride_starts_q,
    scale_log2, window_size, window_sink, query_length, key_length, num_query_blocks, chunks,
    GROUP: tl.constexpr, MASK_GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_M: tl.constexpr, TILES_N: tl.constexpr,
    MAXIMUM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head, and one of ``chunks`` parts of its block list, per program."""
    i_h = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    i_b = (tl.program_id(2) // chunks).to(tl.int64)
    i_c = tl.program_id(2) % chunks
    i_q = i_t // TILES_M
    i_mh = i_h // MASK_GROUP

    first = tl.load(p_query_offsets + i_q)
    end = tl.load(p_query_offsets + i_q + 1)
    start = first + (i_t % TILES_M) * BLOCK_M
    if start >= end:
        return

    p_ids += i_b * stride_ids_b + i_mh * stride_ids_h + i_q.to(tl.int64) * stride_ids_q
    p_key_offsets += i_b * stride_key_offsets_b
    p_k += i_b * stride_kb + i_h // GROUP * stride_kh
    p_out += i_b * stride_pb + i_h * stride_ph + i_q.to(tl.int64) * stride_pq + (i_t % TILES_M) * stride_pt
    if p_shifts is not None:
        shift = tl.load(p_shifts + i_b * stride_shifts_b + i_q)
    else:
        shift = key_length - query_length
    sink_end = 0
    if WINDOW:
        if p_whole is not None:
            p_whole += i_b * stride_whole_b + i_mh * stride_whole_h + i_q.to(tl.int64) * stride_whole_q
        sink_end = tl.load(p_starts + i_b * stride_starts_b + i_q * stride_starts_q) + window_sink

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < end
    b_position = o_m + shift
    p_rows = p_q + i_b * stride_qb + i_h * stride_qh + o_m.to(tl.int64)[:, None] * stride_qs + o_d[None, :]
    # [BLOCK_M, BLOCK_D] queries
    b_q = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_lse += i_b * stride_lb + i_h * stride_lh
    b_lse = tl.load(p_lse + o_m.to(tl.int64) * stride_ls, mask=m_m, other=float("inf")) * 1.4426950408889634
    # [BLOCK_M], infinite for rows that do not exist and for those that saw nothing: their probabilities are 0
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)

    count = tl.load(p_counts + i_b * stride_counts_b + i_mh * stride_counts_h + i_q)
    if CAUSAL:
        # ids ascend, so the blocks no row of this tile sees come last
        visible_end = tl.minimum(start + BLOCK_M, end) + shift
        visible = 0
        for o_c in range(0, count, 1024):
            o_id = o_c + tl.arange(0, 1024)
            b_id = tl.load(p_ids + o_id, mask=o_id < count, other=0)
            b_start = tl.load(p_key_offsets + b_id, mask=o_id < count, other=0)
            visible += tl.sum(((o_id < count) & (b_start < visible_end)).to(tl.int32), 0)
        count = visible

    o_n = tl.arange(0, BLOCK_N)
    # offsets within a tile, [BLOCK_D, BLOCK_N]
    o_k = o_n.to(tl.int64)[None, :] * stride_ks + o_d[:, None]
    share = (count + chunks - 1) // chunks
    # what the tiles of the current block give so far: a base-2 logarithm for the maximum, or a sum
    empty = float("-inf") if MAXIMUM else 0.0
    reduced = empty
    for i_n in range(i_c * share * TILES_N, tl.minimum((i_c + 1) * share, count) * TILES_N):
        i_k = tl.load(p_ids + i_n // TILES_N)
        o_start = tl.load(p_key_offsets + i_k) + (i_n % TILES_N) * BLOCK_N
        m_n = o_start + o_n < tl.load(p_key_offsets + i_k + 1)
        # [BLOCK_D, BLOCK_N] keys
        b_k = tl.load(p_k + o_start.to(tl.int64) * stride_ks + o_k, mask=m_n[None, :] & m_d[:, None], other=0.0)
        # [BLOCK_M, BLOCK_N] base-2 logarithms of probabilities
        b_p = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2 - b_lse[:, None]
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & ((o_start + o_n)[None, :] <= b_position[:, None])
        if WINDOW:
            m_free = o_start + o_n < sink_end
            if p_whole is not None:
                m_free = m_free | (tl.load(p_whole + i_n // TILES_N) != 0)
            m_s = m_s & (m_free[None, :] | ((o_start + o_n)[None, :] > b_position[:, None] - window_size))
        b_p = tl.where(m_s, b_p, float("-inf"))
        if MAXIMUM:
            reduced = tl.maximum(reduced, tl.max(tl.max(b_p, 1), 0))
        else:
            reduced += tl.sum(tl.sum(tl.exp2(b_p), 1), 0)
        if i_n % TILES_N == TILES_N - 1:
            if MAXIMUM:
                tl.store(p_out + i_k, tl.exp2(reduced))
            else:
                tl.store(p_out + i_k, reduced / (end - first).to(tl.float32))
            reduced = empty


class Tiling(NamedTuple):
    """Tile sizes and launch options of one program."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def choose_tiling(
    dtype: torch.dtype, head_dim: int, query_block_size: int, block_size: int, shared_memory: int
) -> Tiling:
    """The tiling for a dtype, head dimension and block sizes on a GPU with ``shared_memory`` bytes per program.

    16 bits: 128 × 64, with 4 warps up to head_dim 128 where 200 KB are to be had, so that two programs share a
    multiprocessor. Larger heads take half the rows. fp32 runs on the ordinary cores, which take whole rows of both
    operands into registers. Blocks shorter than a tile shrink it.
    """
    large = shared_memory >= 200 * 1024
    if dtype == torch.float32:
        tiling = Tiling(32, 32, 8, 2) if head_dim <= 64 else Tiling(32 if head_dim <= 128 else 16, 16, 8, 2)
    elif head_dim <= 128:
        tiling = Tiling(128, 64, 4, 3) if large else Tiling(128, 64, 8, 3 if head_dim <= 64 else 2)
    else:
        tiling = Tiling(64, 64, 8, 3) if large else Tiling(64, 32, 8, 2)
    rows = min(tiling.rows, max(16, triton.next_power_of_2(query_block_size)))
    columns = min(tiling.columns, max(16, triton.next_power_of_2(block_size)))
    return Tiling(rows, columns, tiling.num_warps if rows * columns >= 64 * 64 else 4, tiling.num_stages)


def block_probabilities(
    query: Tensor,
    key: Tensor,
    block_mask: BlockMask,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    maximum: bool,
    tiling: Tiling | None = None,
) -> Tensor:
    """Scores once more, tile by tile, each reduced to one number before the next.

    See ``draftattn.kernels.probabilities.block_probabilities`` for the arguments; ``maximum`` or the sum. A query
    block longer than a tile is several programs, whose numbers are reduced in a second step.
    """
    batch, query_length, heads, head_dim = query.shape
    if tiling is None:
        sizes = block_mask.largest_query_block, block_mask.block_size
        tiling = choose_tiling(query.dtype, head_dim, *sizes, shared_memory(query.device))
    tiles_m = triton.cdiv(block_mask.largest_query_block, tiling.rows)
    num_query_blocks = block_mask.num_query_blocks
    out = torch.zeros(
        (batch, heads, num_query_blocks, tiles_m, block_mask.num_key_blocks), dtype=torch.float32, device=query.device
    )
    if out.numel() == 0 or query.numel() == 0:
        return out[:, :, :, 0]
    programs = batch * heads * num_query_blocks * tiles_m
    # parts of a list are independent: enough for four programs a multiprocessor, at least four blocks each
    chunks = max(1, min(4 * num_multiprocessors(query.device) // programs, block_mask.kv_indices.shape[3] // 4))

    counts, ids = contiguous_last(block_mask.kv_num_blocks), contiguous_last(block_mask.kv_indices)
    query_offsets, key_offsets = contiguous_last(block_mask.query_offsets), contiguous_last(block_mask.key_offsets)
    shifts = None if block_mask.query_shifts is None else contiguous_last(block_mask.query_shifts)
    whole = starts = None
    size = sink = 0
    if (window := block_mask.window) is not None:
        size, sink = window.size, window.sink
        starts = key_offsets if window.starts is None else contiguous_last(window.starts)
        whole = None if window.whole is None else contiguous_last(window.whole.view(torch.uint8))
    # without starts of its own every query block takes the first key of the first block
    starts_stride = 0 if window is None or window.starts is None else 1

    with torch.cuda.device_of(query):
        block_probabilities_kernel[(heads, num_query_blocks * tiles_m, batch * chunks)](
            query, key, lse, out,
            counts, ids, query_offsets, key_offsets, shifts, whole, starts,
            *query.stride()[:3], *key.stride()[:3], *lse.stride(), *out.stride()[:4],
            *shared_strides(counts, 2), *shared_strides(ids, 3), item_stride(key_offsets), item_stride(shifts),
            *shared_strides(whole, 3), item_stride(starts), starts_stride,
            scale * _LOG2_E, size, sink, query_length, key.shape[1], num_query_blocks, chunks,
            GROUP=heads // key.shape[2], MASK_GROUP=heads // block_mask.kv_indices.shape[1],
            D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_M=tiling.rows, BLOCK_N=tiling.columns,
            TILES_M=tiles_m, TILES_N=triton.cdiv(block_mask.block_size, tiling.columns),
            MAXIMUM=maximum, CAUSAL=causal, WINDOW=window is not None,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip
    if tiles_m == 1:
        return out[:, :, :, 0]
    return out.amax(3) if maximum else out.sum(3)
