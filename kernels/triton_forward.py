"""Portable block-sparse attention in Triton, forward only."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from draftattn.kernels.api import BlockMeans
    from draftattn.kernels.block_mask import BlockMask

_LOG2_E = 1.4426950408889634


@triton.jit
def _online_softmax(b_s, b_v, b_acc, b_max, b_sum):
    """Adds scores ``b_s`` (base 2, -inf where masked, [M, N]) and their values ([N, D]) to the running softmax."""
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    # a row with no valid key so far keeps a finite pivot, for -inf - -inf is NaN
    b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    # [M, N] probabilities
    b_p = tl.exp2(b_s - b_pivot[:, None])
    # [M] rescales what was summed so far
    b_rescale = tl.exp2(b_max - b_pivot)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None], input_precision="ieee")
    return b_acc, b_new_max, b_sum


@triton.jit
def _zero_rows(p_out, p_lse, start, end, stride_os, D, BLOCK_D, BLOCK_M, RETURN_LSE):
    """Writes what rows outside every query block give: zeros, and an LSE of -inf."""
    o_d = tl.arange(0, BLOCK_D)
    for o_row in range(start, end, BLOCK_M):
        o_m = o_row + tl.arange(0, BLOCK_M)
        m_m = o_m < end
        p_rows = p_out + o_m.to(tl.int64)[:, None] * stride_os + o_d[None, :]
        b_zero = tl.zeros((BLOCK_M, BLOCK_D), dtype=p_out.dtype.element_ty)
        tl.store(p_rows, b_zero, mask=m_m[:, None] & (o_d < D)[None, :])
        if RETURN_LSE:
            tl.store(p_lse + o_m, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=m_m)


@triton.jit
def attention_forward_kernel(
    p_q, p_k, p_v, p_out, p_lse,
    p_counts, p_ids, p_query_offsets, p_key_offsets,
    p_mean_k, p_mean_v, p_map,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_lb, stride_lh,
    stride_counts_b, stride_counts_h,
    stride_ids_b, stride_ids_h, stride_ids_q,
    stride_key_offsets_b,
    stride_mkb, stride_mkn, stride_mkh,
    stride_mvb, stride_mvn, stride_mvh,
    stride_map_b, stride_map_h, stride_map_q,
    scale_log2, group, query_length, key_length, num_query_blocks, num_key_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    TILES_M: tl.constexpr, TILES_N: tl.constexpr,
    CAUSAL: tl.constexpr, RESIDUAL: tl.constexpr, RETURN_LSE: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head per program; a block of up to 128 rows is TILES_M tiles."""
    i_t = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_q = i_t // TILES_M
    i_kh = i_h // group
    p_out += i_b * stride_ob + i_h * stride_oh
    p_lse += i_b * stride_lb + i_h * stride_lh

    # the grid holds one program more than tiles, for the rows before the first block and after the last
    if i_q == num_query_blocks:
        _zero_rows(p_out, p_lse, 0, tl.load(p_query_offsets), stride_os, D, BLOCK_D, BLOCK_M, RETURN_LSE)
        last = tl.load(p_query_offsets + num_query_blocks)
        _zero_rows(p_out, p_lse, last, query_length, stride_os, D, BLOCK_D, BLOCK_M, RETURN_LSE)
        return

    start = tl.load(p_query_offsets + i_q) + (i_t % TILES_M) * BLOCK_M
    end = tl.load(p_query_offsets + i_q + 1)
    if start >= end:
        return

    p_counts += i_b * stride_counts_b + i_h * stride_counts_h + i_q
    p_ids += i_b * stride_ids_b + i_h * stride_ids_h + i_q.to(tl.int64) * stride_ids_q
    p_key_offsets += i_b * stride_key_offsets_b
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_kh * stride_kh
    p_v += i_b * stride_vb + i_kh * stride_vh

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < end
    # [BLOCK_M], bottom-right aligned: the last query sees every key
    o_visible = o_m + (key_length - query_length)

    # [BLOCK_M, BLOCK_D] queries
    m_q = m_m[:, None] & m_d[None, :]
    b_q = tl.load(p_q + o_m.to(tl.int64)[:, None] * stride_qs + o_d[None, :], mask=m_q, other=0.0)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)

    count = tl.load(p_counts)
    if CAUSAL:
        # ids ascend, so the blocks no row of this tile sees come last
        visible_end = tl.minimum(start + BLOCK_M, end) + (key_length - query_length)
        visible = 0
        for o_c in range(0, count, 128):
            o_id = o_c + tl.arange(0, 128)
            b_id = tl.load(p_ids + o_id, mask=o_id < count, other=0)
            b_start = tl.load(p_key_offsets + b_id)
            visible += tl.sum(((o_id < count) & (b_start < visible_end)).to(tl.int32), 0)
        count = visible

    o_n = tl.arange(0, BLOCK_N)
    # offsets within a tile, [BLOCK_D, BLOCK_N] and [BLOCK_N, BLOCK_D]
    o_k = o_n.to(tl.int64)[None, :] * stride_ks + o_d[:, None]
    o_v = o_n.to(tl.int64)[:, None] * stride_vs + o_d[None, :]
    for i_n in range(0, count * TILES_N):
        i_k = tl.load(p_ids + i_n // TILES_N)
        o_start = tl.load(p_key_offsets + i_k) + (i_n % TILES_N) * BLOCK_N
        m_n = o_start + o_n < tl.load(p_key_offsets + i_k + 1)
        # [BLOCK_D, BLOCK_N] keys
        b_k = tl.load(p_k + o_start.to(tl.int64) * stride_ks + o_k, mask=m_n[None, :] & m_d[:, None], other=0.0)
        # [BLOCK_N, BLOCK_D] values
        b_v = tl.load(p_v + o_start.to(tl.int64) * stride_vs + o_v, mask=m_n[:, None] & m_d[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N] scores
        b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & ((o_start + o_n)[None, :] <= o_visible[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_acc, b_max, b_sum = _online_softmax(b_s, b_v, b_acc, b_max, b_sum)

    if RESIDUAL:
        p_map += i_b * stride_map_b + i_h * stride_map_h + i_q.to(tl.int64) * stride_map_q
        p_mean_k += i_b * stride_mkb + i_kh * stride_mkh
        p_mean_v += i_b * stride_mvb + i_kh * stride_mvh
        for o_block in range(0, num_key_blocks, BLOCK_R):
            o_r = o_block + tl.arange(0, BLOCK_R)
            m_r = o_r < num_key_blocks
            b_start = tl.load(p_key_offsets + o_r, mask=m_r, other=0)
            b_end = tl.load(p_key_offsets + o_r + 1, mask=m_r, other=0)
            m_r = m_r & (b_end > b_start) & (tl.load(p_map + o_r, mask=m_r, other=1) == 0)
            # [BLOCK_R], a mean counts as often as its block has tokens
            b_bias = tl.log2(tl.maximum(b_end - b_start, 1).to(tl.float32))
            o_r = o_r.to(tl.int64)
            # [BLOCK_D, BLOCK_R] mean keys
            p_tile = p_mean_k + o_r[None, :] * stride_mkn + o_d[:, None]
            b_k = tl.load(p_tile, mask=m_r[None, :] & m_d[:, None], other=0.0)
            # [BLOCK_R, BLOCK_D] mean values
            p_tile = p_mean_v + o_r[:, None] * stride_mvn + o_d[None, :]
            b_v = tl.load(p_tile, mask=m_r[:, None] & m_d[None, :], other=0.0)
            # [BLOCK_M, BLOCK_R] scores
            b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2 + b_bias[None, :]
            m_s = m_r[None, :]
            if CAUSAL:
                m_s = m_s & (b_end[None, :] <= o_visible[:, None] + 1)
            b_s = tl.where(m_s, b_s, float("-inf"))
            b_acc, b_max, b_sum = _online_softmax(b_s, b_v, b_acc, b_max, b_sum)

    # a row that saw nothing has a sum of 0 and gives zeros
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    p_rows = p_out + o_m.to(tl.int64)[:, None] * stride_os + o_d[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_q)
    if RETURN_LSE:
        tl.store(p_lse + o_m, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=m_m)


class Tiling(NamedTuple):
    """Tile sizes and launch options of one program."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def choose_tiling(dtype: torch.dtype, head_dim: int, block_size: int, shared_memory: int) -> Tiling:
    """The tiling for a dtype and head dimension on a GPU with ``shared_memory`` bytes per program.

    ============  ===========================  ==========================
    head_dim      16-bit, at least 200 KB      16-bit, less (fits 99 KB)
    ============  ===========================  ==========================
    up to 64      128 × 128, 8 warps, 3 stages  128 × 64, 4 warps, 3 stages
    up to 128     128 × 128, 8 warps, 2 stages  128 × 64, 8 warps, 2 stages
    up to 256     64 × 64, 8 warps, 2 stages    64 × 32, 8 warps, 2 stages
    ============  ===========================  ==========================

    fp32 runs on the ordinary cores, which take whole rows of both operands into registers: 64 × 32, 32 × 16 and
    16 × 16. Blocks shorter than a tile shrink it.
    """
    large = shared_memory >= 200 * 1024
    if dtype == torch.float32:
        tiling = Tiling(64, 32, 8, 2) if head_dim <= 64 else Tiling(32 if head_dim <= 128 else 16, 16, 8, 1)
    elif head_dim <= 64:
        tiling = Tiling(128, 128, 8, 3) if large else Tiling(128, 64, 4, 3)
    elif head_dim <= 128:
        tiling = Tiling(128, 128, 8, 2) if large else Tiling(128, 64, 8, 2)
    else:
        tiling = Tiling(64, 64, 8, 2) if large else Tiling(64, 32, 8, 2)
    longest = max(16, triton.next_power_of_2(block_size))
    if longest >= tiling.rows:
        return tiling._replace(columns=min(tiling.columns, longest))
    return Tiling(longest, min(tiling.columns, longest), 4, tiling.num_stages)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    causal: bool,
    residual: BlockMeans | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """One program per query block (or part of one), online softmax over its chosen blocks, then over skipped means.

    See ``draftattn.kernels.api.block_sparse_attention`` for the arguments. Nothing is copied, and the host never
    waits for the device.
    """
    batch, query_length, heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, query_length, device=query.device) if return_lse else None
    if out.numel() == 0:
        return out, lse

    tiling = choose_tiling(query.dtype, head_dim, block_mask.block_size, _shared_memory(query.device))
    tiles_m = triton.cdiv(block_mask.block_size, tiling.rows)
    counts, ids = _dense_last(block_mask.kv_num_blocks), _dense_last(block_mask.kv_indices)
    query_offsets, key_offsets = _dense_last(block_mask.query_offsets), _dense_last(block_mask.key_offsets)
    if residual is None:
        mean_key, mean_value, block_map = key, value, ids
    else:
        mean_key, mean_value = _dense_last(residual.key), _dense_last(residual.value)
        block_map = _dense_last(block_mask.block_map.view(torch.uint8))
    lse_or_any = out if lse is None else lse

    with torch.cuda.device_of(query):
        attention_forward_kernel[(block_mask.num_query_blocks * tiles_m + 1, heads, batch)](
            query, key, value, out, lse_or_any,
            counts, ids, query_offsets, key_offsets,
            mean_key, mean_value, block_map,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *lse_or_any.stride()[:2],
            *_shared_strides(counts)[:2], *_shared_strides(ids)[:3],
            key_offsets.stride(0) if key_offsets.ndim == 2 else 0,
            *mean_key.stride()[:3], *mean_value.stride()[:3], *_shared_strides(block_map)[:3],
            scale * _LOG2_E, heads // key.shape[2], query_length, key.shape[1],
            block_mask.num_query_blocks, block_mask.num_key_blocks,
            D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_M=tiling.rows, BLOCK_N=tiling.columns, BLOCK_R=min(64, tiling.columns),
            TILES_M=tiles_m, TILES_N=triton.cdiv(block_mask.block_size, tiling.columns),
            CAUSAL=causal, RESIDUAL=residual is not None, RETURN_LSE=return_lse,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip
    return out, lse


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shared_strides(x: Tensor) -> list[int]:
    """Strides with 0 for the dimensions that all batch items or heads share."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one program may use; the interpreter takes the tiling of a large GPU."""
    if device.type != "cuda":
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
