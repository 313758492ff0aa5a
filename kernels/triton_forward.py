"""Portable block-sparse attention in Triton, forward only."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels import triton_decode
from draftattn.kernels.triton_launch import contiguous_last, item_stride, shared_memory, shared_strides

if TYPE_CHECKING:
    from draftattn.kernels.api import BlockMeans
    from draftattn.kernels.block_mask import BlockMask

_LOG2_E = 1.4426950408889634
# older compilers fail on tiles of four-dimensional tensors
_HAS_DESCRIPTORS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


@triton.jit
def _online_softmax(b_s, b_v, b_acc, b_max, b_sum, scale_log2):
    """Adds raw scores ``b_s`` (-inf where masked, [M, N]) and their values ([N, D]) to the running softmax.

    The scale is positive, so that it may follow the maximum: one multiply-add per score. A maximum that stays rescales
    by exactly 1, for its difference is scaled: a multiply-add against the scaled pivot would be off by the pivot's
    rounding in every tile, and sums drift with their number.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    # a row with no valid key so far keeps a finite pivot, for -inf - -inf is NaN
    b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    # [M, N] probabilities
    b_p = tl.exp2(b_s * scale_log2 - (b_pivot * scale_log2)[:, None])
    # [M] rescales what was summed so far
    b_rescale = tl.exp2((b_max - b_pivot) * scale_log2)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    if b_v.dtype == tl.float32:
        # a product that adds to what was summed before rounds it once per key; fma keeps the compiler from joining them
        b_pv = tl.dot(b_p, b_v, input_precision="ieee")
        b_acc = tl.fma(b_acc, tl.broadcast_to(b_rescale[:, None], b_acc.shape), b_pv)
    else:
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None])
    return b_acc, b_new_max, b_sum


@triton.jit
def _count_below(p_ids, p_bounds, count, limit):
    """How many of ``count`` ascending ids have a bound below ``limit``; bounds ascend with the ids."""
    below = 0
    for o_c in range(0, count, 128):
        o_id = o_c + tl.arange(0, 128)
        b_id = tl.load(p_ids + o_id, mask=o_id < count, other=0)
        m_id = (o_id < count) & (tl.load(p_bounds + b_id) < limit)
        below += tl.sum(m_id.to(tl.int32), 0)
    return below


@triton.jit
def _attend_to_blocks(
    b_q, b_acc, b_max, b_sum,
    tile_k, tile_v, stride_ks, stride_vs, i_b, i_kh,
    p_ids, p_whole, p_key_offsets, first, last, hidden_from, hidden,
    o_position, lowest, highest, sink_end, window, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TILES_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Softmax over the tiles ``first : last`` of a row's blocks; ``tile_k`` and ``tile_v`` are pointers or descriptors.

    From entry ``hidden_from`` on, the list goes on ``hidden`` entries further.
    """
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    if not DESCRIPTORS:
        # offsets within a tile, [BLOCK_D, BLOCK_N] and [BLOCK_N, BLOCK_D]
        o_k = o_n[None, :] * stride_ks + o_d[:, None]
        o_v = o_n[:, None] * stride_vs + o_d[None, :]

    for i_n in tl.range(first, last, num_stages=STAGES):
        i_entry = i_n // TILES_N
        i_entry += tl.where(i_entry >= hidden_from, hidden, 0)
        i_k = tl.load(p_ids + i_entry)
        o_start = tl.load(p_key_offsets + i_k) + i_n % TILES_N * BLOCK_N
        o_end = tl.load(p_key_offsets + i_k + 1)
        o_key = o_start + o_n
        m_n = o_key < o_end
        # [BLOCK_D, BLOCK_N] keys and [BLOCK_N, BLOCK_D] values
        if DESCRIPTORS:
            b_k = tile_k.load([i_b, i_kh, o_start, 0]).reshape(BLOCK_N, BLOCK_D).T
            b_v = tile_v.load([i_b, i_kh, o_start, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            m_d = o_d < D
            p_tile = tile_k + o_start.to(tl.int64) * stride_ks
            b_k = tl.load(p_tile + o_k, mask=m_n[None, :] & m_d[:, None], other=0.0)
            p_tile = tile_v + o_start.to(tl.int64) * stride_vs
            b_v = tl.load(p_tile + o_v, mask=m_n[:, None] & m_d[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N] scores
        b_s = tl.dot(b_q, b_k, input_precision="ieee")

        # most tiles lie whole within what every row sees
        partial = o_start + BLOCK_N > o_end
        if CAUSAL:
            partial = partial | (o_start + BLOCK_N - 1 > lowest)
        if window is not None:
            whole = False
            if p_whole is not None:
                i_entry = i_n // TILES_N
                whole = tl.load(p_whole + i_entry) != 0
            partial = partial | ((not whole) & (o_start <= highest - window) & (o_start + BLOCK_N > sink_end))
        if partial:
            m_s = m_n[None, :]
            if CAUSAL:
                m_s = m_s & (o_key[None, :] <= o_position[:, None])
            if window is not None:
                m_near = (o_key[None, :] > o_position[:, None] - window) | (o_key < sink_end)[None, :]
                m_s = m_s & (m_near | whole)
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_acc, b_max, b_sum = _online_softmax(b_s, b_v, b_acc, b_max, b_sum, scale_log2)
    return b_acc, b_max, b_sum


@triton.jit
def _zero_rows(p_out, p_lse, start, end, stride_os, D, BLOCK_D, BLOCK_M):
    """Writes what rows outside every query block give: zeros, and an LSE of -inf."""
    o_d = tl.arange(0, BLOCK_D)
    for o_row in range(start, end, BLOCK_M):
        o_m = o_row + tl.arange(0, BLOCK_M)
        m_m = o_m < end
        p_rows = p_out + o_m.to(tl.int64)[:, None] * stride_os + o_d[None, :]
        b_zero = tl.zeros((BLOCK_M, BLOCK_D), dtype=p_out.dtype.element_ty)
        tl.store(p_rows, b_zero, mask=m_m[:, None] & (o_d < D)[None, :])
        if p_lse is not None:
            tl.store(p_lse + o_m, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=m_m)


_INTEGERS = (
    "stride_lb", "stride_lh", "stride_counts_b", "stride_counts_h", "stride_ids_b", "stride_ids_h", "stride_ids_q",
    "stride_whole_b", "stride_whole_h", "stride_whole_q", "stride_key_offsets_b", "stride_shifts_b", "stride_starts_b",
    "query_length", "key_length", "num_query_blocks", "num_key_blocks", "window", "sink",
)  # fmt: skip


# what changes from call to call compiles nothing anew
@triton.jit(do_not_specialize=_INTEGERS)
def attention_forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, d_k, d_v,
    p_counts, p_ids, p_query_offsets, p_key_offsets, p_shifts, p_whole, p_starts,
    p_mean_k, p_mean_v, d_mean_k, d_mean_v, p_map, p_bias,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_lb, stride_lh,
    stride_counts_b, stride_counts_h,
    stride_ids_b, stride_ids_h, stride_ids_q,
    stride_whole_b, stride_whole_h, stride_whole_q,
    stride_key_offsets_b, stride_shifts_b, stride_starts_b,
    stride_mkb, stride_mkn, stride_mkh,
    stride_mvb, stride_mvn, stride_mvh,
    stride_map_b, stride_map_h, stride_map_q, stride_bias_b,
    scale_log2, group, heads_per_mask, query_length, key_length, num_query_blocks, num_key_blocks, num_means,
    window, sink,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES_M: tl.constexpr, TILES_N: tl.constexpr, PACK: tl.constexpr, CAUSAL: tl.constexpr, FLIP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of query rows per program; a block of up to 128 rows is TILES_M tiles.

    The rows of a tile are tokens of one head, or pairs of a token and one of PACK heads that share a key head. What
    is None is left out: an LSE (``p_lse``), descriptors (``d_``), shifts, a window, a residual (``p_map``).
    """
    i_t = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64) * PACK
    i_b = tl.program_id(2).to(tl.int64)
    i_q = i_t // TILES_M
    i_kh = i_h // group
    i_mh = i_h // heads_per_mask
    p_out += i_b * stride_ob + i_h * stride_oh
    if p_lse is not None:
        p_lse += i_b * stride_lb + i_h * stride_lh

    # the grid holds one program more than tiles, for the rows before the first block and after the last
    if i_q == num_query_blocks:
        last = tl.load(p_query_offsets + num_query_blocks)
        for _ in range(PACK):
            _zero_rows(p_out, p_lse, 0, tl.load(p_query_offsets), stride_os, D, BLOCK_D, BLOCK_M)
            _zero_rows(p_out, p_lse, last, query_length, stride_os, D, BLOCK_D, BLOCK_M)
            p_out += stride_oh
            if p_lse is not None:
                p_lse += stride_lh
        return

    start = tl.load(p_query_offsets + i_q) + (i_t % TILES_M) * BLOCK_M
    end = tl.load(p_query_offsets + i_q + 1)
    if start >= end:
        return

    p_ids += i_b * stride_ids_b + i_mh * stride_ids_h + i_q.to(tl.int64) * stride_ids_q
    p_key_offsets += i_b * stride_key_offsets_b
    p_k += i_b * stride_kb + i_kh * stride_kh
    p_v += i_b * stride_vb + i_kh * stride_vh

    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_M] tokens and heads of the rows, a token's heads side by side
    o_r = tl.arange(0, BLOCK_M)
    o_m = start + o_r // PACK
    o_g = (o_r % PACK).to(tl.int64)
    m_q = (o_m < end)[:, None] & (o_d < D)[None, :]
    p_q += i_b * stride_qb + i_h * stride_qh
    b_q = tl.load(p_q + (o_m.to(tl.int64) * stride_qs + o_g * stride_qh)[:, None] + o_d[None, :], mask=m_q, other=0.0)
    if FLIP:
        b_q = -b_q
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)

    # where the rows stand among the keys
    if p_shifts is None:
        shift = key_length - query_length
    else:
        shift = tl.load(p_shifts + i_b * stride_shifts_b + i_q)
    o_position = o_m + shift
    lowest = start + shift
    highest = tl.minimum(start + (BLOCK_M - 1) // PACK + 1, end) - 1 + shift

    count = tl.load(p_counts + i_b * stride_counts_b + i_mh * stride_counts_h + i_q)
    if CAUSAL:
        # ids ascend, so the blocks that no row of this tile sees come last
        count = _count_below(p_ids, p_key_offsets, count, highest + 1)
    hidden_from, hidden, sink_end = count, 0, 0
    if window is not None:
        if p_starts is None:
            sink_end = tl.load(p_key_offsets) + sink
        else:
            sink_end = tl.load(p_starts + i_b * stride_starts_b + i_q) + sink
        if p_whole is None:
            # blocks behind the sinks and before the window of the first row
            hidden_from = _count_below(p_ids, p_key_offsets, count, sink_end)
            hidden = _count_below(p_ids, p_key_offsets + 1, count, lowest - window + 2) - hidden_from
            hidden = tl.maximum(hidden, 0)
            count -= hidden
        else:
            p_whole += i_b * stride_whole_b + i_mh * stride_whole_h + i_q.to(tl.int64) * stride_whole_q

    plain = 0
    if d_k is not None:
        plain = count
        last_key = tl.load(p_key_offsets + num_key_blocks)
        if last_key < key_length:
            # A tile must not reach past the last block, where anything may stand, for 0 * NaN is NaN.
            plain = _count_below(p_ids, p_key_offsets, count + hidden, last_key - TILES_N * BLOCK_N + 1)
            plain = tl.where(plain > hidden_from, tl.maximum(plain - hidden, hidden_from), plain)
        b_acc, b_max, b_sum = _attend_to_blocks(
            b_q, b_acc, b_max, b_sum,
            d_k, d_v, stride_ks, stride_vs, i_b.to(tl.int32), i_kh.to(tl.int32),
            p_ids, p_whole, p_key_offsets, 0, plain * TILES_N, hidden_from, hidden,
            o_position, lowest, highest, sink_end, window, scale_log2,
            D, BLOCK_D, BLOCK_N, TILES_N, True, STAGES, CAUSAL,
        )  # fmt: skip
    b_acc, b_max, b_sum = _attend_to_blocks(
        b_q, b_acc, b_max, b_sum,
        p_k, p_v, stride_ks, stride_vs, i_b, i_kh,
        p_ids, p_whole, p_key_offsets, plain * TILES_N, count * TILES_N, hidden_from, hidden,
        o_position, lowest, highest, sink_end, window, scale_log2,
        D, BLOCK_D, BLOCK_N, TILES_N, False, STAGES if d_k is None else 1, CAUSAL,
    )  # fmt: skip

    if p_map is not None:
        p_map += i_b * stride_map_b + i_mh * stride_map_h + i_q.to(tl.int64) * stride_map_q
        p_bias += i_b * stride_bias_b
        p_mean_k += i_b * stride_mkb + i_kh * stride_mkh
        p_mean_v += i_b * stride_mvb + i_kh * stride_mvh
        for o_block in tl.range(0, num_means, BLOCK_N, num_stages=STAGES):
            o_n = o_block + tl.arange(0, BLOCK_N)
            m_n = o_n < num_means
            # [BLOCK_D, BLOCK_N] mean keys and [BLOCK_N, BLOCK_D] mean values
            if d_mean_k is not None:
                b_k = d_mean_k.load([i_b.to(tl.int32), i_kh.to(tl.int32), o_block, 0]).reshape(BLOCK_N, BLOCK_D).T
                b_v = d_mean_v.load([i_b.to(tl.int32), i_kh.to(tl.int32), o_block, 0]).reshape(BLOCK_N, BLOCK_D)
            else:
                m_d = o_d < D
                p_tile = p_mean_k + o_n.to(tl.int64)[None, :] * stride_mkn + o_d[:, None]
                b_k = tl.load(p_tile, mask=m_n[None, :] & m_d[:, None], other=0.0)
                p_tile = p_mean_v + o_n.to(tl.int64)[:, None] * stride_mvn + o_d[None, :]
                b_v = tl.load(p_tile, mask=m_n[:, None] & m_d[None, :], other=0.0)
            # [BLOCK_M, BLOCK_N] scores
            b_s = tl.dot(b_q, b_k, input_precision="ieee")
            m_s = (tl.load(p_map + o_n, mask=m_n, other=1) == 0)[None, :]
            if CAUSAL:
                b_end = tl.load(p_key_offsets + o_n + 1, mask=m_n, other=0)
                m_s = m_s & (b_end[None, :] <= o_position[:, None] + 1)
            # [BLOCK_N], a mean counts as often as its block has tokens. Added to what is masked already: the compiler
            # would begin the product with it, and fp32 lose digits at each of the steps that follow
            b_bias = tl.load(p_bias + o_n)
            b_s = tl.where(m_s, b_s, float("-inf")) + b_bias[None, :]
            b_acc, b_max, b_sum = _online_softmax(b_s, b_v, b_acc, b_max, b_sum, scale_log2)

    # a row that saw nothing has a sum of 0 and gives zeros
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    p_rows = p_out + (o_m.to(tl.int64) * stride_os + o_g * stride_oh)[:, None] + o_d[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_q)
    if p_lse is not None:
        b_lse = (b_max * scale_log2 + tl.log2(b_sum)) * 0.6931471805599453
        tl.store(p_lse + o_m + o_g * stride_lh, b_lse, mask=o_m < end)


class Tiling(NamedTuple):
    """Tile sizes and launch options of one program."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@functools.cache  # every call asks
def choose_tiling(dtype: torch.dtype, head_dim: int, query_rows: int, block_size: int, shared_memory: int) -> Tiling:
    """The tiling for a dtype and head dimension on a GPU with ``shared_memory`` bytes per program.

    ============  ============================  ===========================
    head_dim      16-bit, at least 200 KB       16-bit, less (fits 99 KB)
    ============  ============================  ===========================
    up to 64      128 × 64, 4 warps, 3 stages   128 × 64, 4 warps, 3 stages
    up to 128     128 × 128, 8 warps, 3 stages  128 × 64, 8 warps, 2 stages
    up to 256     64 × 64, 8 warps, 2 stages    64 × 32, 8 warps, 2 stages
    ============  ============================  ===========================

    fp32 runs on the ordinary cores, which take whole rows of both operands into registers: 64 × 32, 32 × 16 and
    16 × 16. Query blocks of at most ``query_rows`` rows and key blocks of at most ``block_size`` tokens shrink a tile
    that is larger, down to 16.
    """
    large = shared_memory >= 200 * 1024
    if dtype == torch.float32:
        tiling = Tiling(64, 32, 8, 2) if head_dim <= 64 else Tiling(32 if head_dim <= 128 else 16, 16, 8, 1)
    elif head_dim <= 64:
        tiling = Tiling(128, 64, 4, 3)
    elif head_dim <= 128:
        tiling = Tiling(128, 128, 8, 3) if large else Tiling(128, 64, 8, 2)
    else:
        tiling = Tiling(64, 64, 8, 2) if large else Tiling(64, 32, 8, 2)
    tiling = tiling._replace(columns=min(tiling.columns, max(16, triton.next_power_of_2(block_size))))
    rows = max(16, triton.next_power_of_2(query_rows))
    return tiling if rows >= tiling.rows else tiling._replace(rows=rows, num_warps=4)


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
    lse = torch.empty(batch, heads, query_length, dtype=torch.float32, device=query.device) if return_lse else None
    if out.numel() == 0:
        return out, lse
    if triton_decode.serves(query, key, block_mask):
        return triton_decode.attention_forward(
            query, key, value, block_mask, scale=scale, causal=causal, residual=residual, return_lse=return_lse
        )

    group, mask_heads, rows = heads // key.shape[2], block_mask.kv_num_blocks.shape[1], block_mask.largest_query_block
    choose = functools.partial(
        choose_tiling,
        query.dtype,
        head_dim,
        block_size=block_mask.block_size,
        shared_memory=shared_memory(query.device),
    )
    # heads that share keys and pattern fill one tile, if it holds a whole query block of them
    pack = group if mask_heads in (1, key.shape[2]) and rows * group <= choose(query_rows=128).rows else 1
    tiling = choose(query_rows=rows * pack)
    tiles_m = triton.cdiv(rows * pack, tiling.rows)
    block_d = triton.next_power_of_2(head_dim)
    for name, x in (("key", key), ("value", value)):
        if x.stride(1) * tiling.columns >= 2**31:
            raise ValueError(
                f"{name} has tokens {x.stride(1)} elements apart; allowed are {2**31 // tiling.columns - 1}"
            )

    counts, ids = contiguous_last(block_mask.kv_num_blocks), contiguous_last(block_mask.kv_indices)
    query_offsets, key_offsets = contiguous_last(block_mask.query_offsets), contiguous_last(block_mask.key_offsets)
    shifts = contiguous_last(block_mask.query_shifts)
    size, sink, whole, starts = block_mask.window or (None, None, None, None)
    whole, starts = None if whole is None else contiguous_last(whole.view(torch.uint8)), contiguous_last(starts)
    # a scale of 0 would make NaN of the masked scores
    scale_log2 = max(abs(scale) * _LOG2_E, 1e-30)
    means = block_map = bias = None
    if residual is not None:
        means = contiguous_last(residual.key), contiguous_last(residual.value)
        block_map = contiguous_last(block_mask.block_map.view(torch.uint8))
        bias = _mean_bias(key_offsets, scale_log2, tiling.columns)
    tiles_k, tiles_v = _describe((key, value), tiling.columns, block_d)
    mean_key, mean_value = means or (None, None)
    tiles_mean_k, tiles_mean_v = _describe(means, tiling.columns, block_d)

    with torch.cuda.device_of(query):
        attention_forward_kernel[(block_mask.num_query_blocks * tiles_m + 1, heads // pack, batch)](
            query, key, value, out, lse, tiles_k, tiles_v,
            counts, ids, query_offsets, key_offsets, shifts, whole, starts,
            mean_key, mean_value, tiles_mean_k, tiles_mean_v, block_map, bias,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            *shared_strides(lse, 2), *shared_strides(counts, 2), *shared_strides(ids, 3), *shared_strides(whole, 3),
            *(item_stride(x) for x in (key_offsets, shifts, starts)),
            *shared_strides(mean_key, 3), *shared_strides(mean_value, 3), *shared_strides(block_map, 3),
            *shared_strides(bias, 1),
            scale_log2, group, heads // mask_heads, query_length, key.shape[1],
            block_mask.num_query_blocks, block_mask.num_key_blocks,
            None if residual is None else block_mask.num_key_blocks, size, sink,
            D=head_dim, BLOCK_D=block_d, BLOCK_M=tiling.rows, BLOCK_N=tiling.columns,
            TILES_M=tiles_m, TILES_N=triton.cdiv(block_mask.block_size, tiling.columns),
            PACK=pack, CAUSAL=causal, FLIP=scale < 0, STAGES=tiling.num_stages,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip
    return out, lse


def _mean_bias(key_offsets: Tensor, scale_log2: float, columns: int) -> Tensor:
    """What makes the raw score of a mean count once per token of its block, ``[B | 1, K]`` filled up to whole tiles."""
    bias = torch.atleast_2d(key_offsets).diff().float().log2().div_(scale_log2)
    return torch.nn.functional.pad(bias, (0, -bias.shape[1] % columns), value=-torch.inf)


def _describe(tensors: tuple[Tensor, Tensor] | None, rows: int, columns: int) -> list[Any]:
    """Descriptors of tiles of one head of ``[B, S, H, D]`` tensors, or None for both if the GPU cannot read one so.

    Tokens and channels outside a tensor read as zeros.
    """
    if tensors is None or not all(map(_can_describe, tensors)):
        return [None, None]
    from triton.tools.tensor_descriptor import TensorDescriptor

    described = []
    for x in tensors:
        batch, length, heads, head_dim = x.shape
        # the stride of a dimension of 1 may be anything, and TMA wants multiples of 16 bytes
        strides = [head_dim if x.shape[i] == 1 else x.stride(i) for i in (0, 2, 1)]
        described.append(TensorDescriptor(x, [batch, heads, length, head_dim], [*strides, 1], [1, 1, rows, columns]))
    return described


def _can_describe(x: Tensor) -> bool:
    if not _HAS_DESCRIPTORS or x.dtype == torch.float32 or x.numel() == 0 or not _reads_tiles(x.device):
        return False
    strides = [stride * x.element_size() for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1]
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)


@functools.cache
def _reads_tiles(device: torch.device) -> bool:
    """Whether a GPU copies whole tiles (TMA) and its matrix units read them from shared memory; the interpreter does.

    These are Hopper and the large Blackwell. Elsewhere descriptors only cost registers.
    """
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)
