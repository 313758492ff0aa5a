"""Block-sparse attention for few queries in Triton: the key blocks of a query are split over several programs."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels import triton_launch
from draftattn.kernels.triton_launch import contiguous_last, item_stride, shared_strides

if TYPE_CHECKING:
    from draftattn.kernels.api import BlockMeans
    from draftattn.kernels.block_mask import BlockMask

_LOG2_E = 1.4426950408889634
_MOST_SPLITS = 128
_FEWEST_KEYS = 256  # of a part: with fewer, the second pass costs more than it saves
_LSE_WIDTH = 4  # floats behind a partial output for its LSE, which keeps rows aligned to 16 bytes


@triton.jit
def _online_softmax(b_s, b_v, b_acc, b_max, b_sum):
    """Adds scores ``b_s`` (base 2, -inf where masked, [M, N]) and their values ([N, D]) to the running softmax."""
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    # a row with no valid key so far keeps a finite pivot, for -inf - -inf is NaN
    b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_p = tl.exp2(b_s - b_pivot[:, None])
    b_rescale = tl.exp2(b_max - b_pivot)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None], input_precision="ieee")
    return b_acc, b_new_max, b_sum


@triton.jit
def _keys_of_tile(
    i_n, count, p_ids, p_whole, p_key_offsets,
    BLOCK_N: tl.constexpr, TILES_N: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Keys of tile ``i_n`` of a block list, which of them exist, and which a window spares: each [BLOCK_N].

    A tile is a part of one block, or ENTRIES whole blocks where those are small.
    """
    o_n = tl.arange(0, BLOCK_N)
    m_whole = tl.zeros((BLOCK_N,), dtype=tl.int1)
    if ENTRIES == 1:
        o_e = i_n // TILES_N
        i_k = tl.load(p_ids + o_e)
        o_key = tl.load(p_key_offsets + i_k) + (i_n % TILES_N) * BLOCK_N + o_n
        m_key = o_key < tl.load(p_key_offsets + i_k + 1)
        if p_whole is not None:
            m_whole = m_whole | (tl.load(p_whole + o_e) != 0)
    else:
        BLOCK: tl.constexpr = BLOCK_N // ENTRIES
        o_e = i_n * ENTRIES + o_n // BLOCK
        m_e = o_e < count
        i_k = tl.load(p_ids + o_e, mask=m_e, other=0)
        o_key = tl.load(p_key_offsets + i_k) + o_n % BLOCK
        m_key = m_e & (o_key < tl.load(p_key_offsets + i_k + 1))
        if p_whole is not None:
            m_whole = tl.load(p_whole + o_e, mask=m_e, other=0) != 0
    return o_key, m_key, m_whole


# numbers that grow while a model decodes, and those whose divisibility buys nothing: each would cost compilations
_ANY_VALUE = [
    *("query_length", "key_length", "num_query_blocks", "num_key_blocks", "splits", "window_size", "window_sink"),
    *(f"stride_{name}_{axis}" for name in ("ids", "whole", "map") for axis in "bhq"),
    *("stride_counts_b", "stride_counts_h", "stride_key_offsets_b", "stride_shifts_b", "stride_starts_b"),
]


@triton.jit(do_not_specialize=_ANY_VALUE)
def decode_kernel(
    p_q, p_k, p_v, p_partial,
    p_counts, p_ids, p_query_offsets, p_key_offsets, p_shifts, p_whole, p_starts, p_mean_k, p_mean_v, p_map,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_counts_b, stride_counts_h,
    stride_ids_b, stride_ids_h, stride_ids_q,
    stride_key_offsets_b, stride_shifts_b,
    stride_whole_b, stride_whole_h, stride_whole_q,
    stride_starts_b, stride_starts_q,
    stride_mkb, stride_mkn, stride_mkh,
    stride_mvb, stride_mvn, stride_mvh,
    stride_map_b, stride_map_h, stride_map_q,
    scale_log2, window_size, window_sink, query_length, key_length, num_query_blocks, num_key_blocks, splits,
    GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_M: tl.constexpr, TILES_N: tl.constexpr,
    ENTRIES: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One tile of rows and one part of its block list per program; rows are (token, one of PACK heads) pairs.

    Writes the part's normalised output and base-2 LSE to ``p_partial``, ``[B * H * S_q, splits, WIDTH]``.
    """
    i_r = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    i_b = (tl.program_id(2) // splits).to(tl.int64)
    i_s = tl.program_id(2) % splits
    heads = tl.num_programs(0) * PACK
    i_q = i_t // TILES_M
    i_kh = i_r * PACK // GROUP

    start = tl.load(p_query_offsets + i_q)
    end = tl.load(p_query_offsets + i_q + 1)
    o_row = (i_t % TILES_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    # [BLOCK_M], the token and the head of each row
    o_m = start + o_row // PACK
    o_h = i_r * PACK + o_row % PACK
    m_m = o_m < end
    first_token = start + (i_t % TILES_M) * BLOCK_M // PACK
    if first_token >= end:
        return

    p_ids += i_b * stride_ids_b + i_r * stride_ids_h + i_q.to(tl.int64) * stride_ids_q
    p_key_offsets += i_b * stride_key_offsets_b
    p_k += i_b * stride_kb + i_kh * stride_kh
    p_v += i_b * stride_vb + i_kh * stride_vh
    if p_shifts is not None:
        shift = tl.load(p_shifts + i_b * stride_shifts_b + i_q)
    else:
        shift = key_length - query_length
    # [BLOCK_M], where rows stand among the keys
    b_position = o_m + shift
    sink_end = 0
    if WINDOW:
        if p_whole is not None:
            p_whole += i_b * stride_whole_b + i_r * stride_whole_h + i_q.to(tl.int64) * stride_whole_q
        sink_end = tl.load(p_starts + i_b * stride_starts_b + i_q * stride_starts_q) + window_sink

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_q += i_b * stride_qb
    p_rows = p_q + o_m.to(tl.int64)[:, None] * stride_qs + o_h[:, None] * stride_qh + o_d[None, :]
    # [BLOCK_M, BLOCK_D] queries
    b_q = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)

    count = tl.load(p_counts + i_b * stride_counts_b + i_r * stride_counts_h + i_q)
    if CAUSAL:
        # ids ascend, so the blocks no row of this tile sees come last
        visible_end = tl.minimum(start + ((i_t % TILES_M + 1) * BLOCK_M + PACK - 1) // PACK, end) + shift
        visible = 0
        for o_c in range(0, count, 1024):
            o_id = o_c + tl.arange(0, 1024)
            b_id = tl.load(p_ids + o_id, mask=o_id < count, other=0)
            b_start = tl.load(p_key_offsets + b_id, mask=o_id < count, other=0)
            visible += tl.sum(((o_id < count) & (b_start < visible_end)).to(tl.int32), 0)
        count = visible

    tiles = count * TILES_N if ENTRIES == 1 else (count + ENTRIES - 1) // ENTRIES
    share = (tiles + splits - 1) // splits
    for i_n in range(i_s * share, tl.minimum((i_s + 1) * share, tiles)):
        o_key, m_key, m_whole = _keys_of_tile(i_n, count, p_ids, p_whole, p_key_offsets, BLOCK_N, TILES_N, ENTRIES)
        o_n = o_key.to(tl.int64)
        # [BLOCK_D, BLOCK_N] keys and [BLOCK_N, BLOCK_D] values
        p_tile = p_k + o_n[None, :] * stride_ks + o_d[:, None]
        b_k = tl.load(p_tile, mask=m_key[None, :] & m_d[:, None], other=0.0)
        p_tile = p_v + o_n[:, None] * stride_vs + o_d[None, :]
        b_v = tl.load(p_tile, mask=m_key[:, None] & m_d[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N] scores
        b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
        m_s = m_key[None, :]
        if CAUSAL:
            m_s = m_s & (o_key[None, :] <= b_position[:, None])
        if WINDOW:
            m_free = m_whole | (o_key < sink_end)
            m_s = m_s & (m_free[None, :] | (o_key[None, :] > b_position[:, None] - window_size))
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_acc, b_max, b_sum = _online_softmax(b_s, b_v, b_acc, b_max, b_sum)

    if p_map is not None:
        p_map += i_b * stride_map_b + i_r * stride_map_h + i_q.to(tl.int64) * stride_map_q
        p_mean_k += i_b * stride_mkb + i_kh * stride_mkh
        p_mean_v += i_b * stride_mvb + i_kh * stride_mvh
        tiles = (num_key_blocks + BLOCK_N - 1) // BLOCK_N
        share = (tiles + splits - 1) // splits
        for i_n in range(i_s * share, tl.minimum((i_s + 1) * share, tiles)):
            o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = o_n < num_key_blocks
            b_start = tl.load(p_key_offsets + o_n, mask=m_n, other=0)
            b_end = tl.load(p_key_offsets + o_n + 1, mask=m_n, other=0)
            m_n = m_n & (b_end > b_start) & (tl.load(p_map + o_n, mask=m_n, other=1) == 0)
            # [BLOCK_N], a mean counts as often as its block has tokens
            b_bias = tl.log2(tl.maximum(b_end - b_start, 1).to(tl.float32))
            o_n = o_n.to(tl.int64)
            # [BLOCK_D, BLOCK_N] mean keys and [BLOCK_N, BLOCK_D] mean values
            p_tile = p_mean_k + o_n[None, :] * stride_mkn + o_d[:, None]
            b_k = tl.load(p_tile, mask=m_n[None, :] & m_d[:, None], other=0.0)
            p_tile = p_mean_v + o_n[:, None] * stride_mvn + o_d[None, :]
            b_v = tl.load(p_tile, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2 + b_bias[None, :]
            m_s = m_n[None, :]
            if CAUSAL:
                m_s = m_s & (b_end[None, :] <= b_position[:, None] + 1)
            b_s = tl.where(m_s, b_s, float("-inf"))
            b_acc, b_max, b_sum = _online_softmax(b_s, b_v, b_acc, b_max, b_sum)

    m_seen = b_sum > 0.0
    b_norm = tl.where(m_seen, b_sum, 1.0)
    o_part = (((i_b * heads + o_h) * query_length + o_m) * splits + i_s) * WIDTH
    tl.store(p_partial + o_part[:, None] + o_d[None, :], b_acc / b_norm[:, None], mask=m_m[:, None] & m_d[None, :])
    tl.store(p_partial + o_part + D, tl.where(m_seen, b_max + tl.log2(b_norm), float("-inf")), mask=m_m)


@triton.jit(do_not_specialize=["num_rows", "query_length", "num_query_blocks", "heads", "splits"])
def merge_splits_kernel(
    p_partial, p_out, p_lse, p_query_offsets,
    num_rows, query_length, num_query_blocks, heads, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Merges the parts of BLOCK_R rows (item, head, token) by their LSE. Rows outside every block give zeros."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_rows
    o_m = o_r % query_length
    o_h = o_r // query_length % heads
    o_b = o_r // query_length // heads
    m_covered = (o_m >= tl.load(p_query_offsets)) & (o_m < tl.load(p_query_offsets + num_query_blocks))
    # [BLOCK_R], parts that were written
    b_parts = tl.where(m_r & m_covered, splits, 0)
    p_row = p_partial + o_r * splits * WIDTH
    o_s = tl.arange(0, BLOCK_S)
    # [BLOCK_R, BLOCK_S] of every part
    p_tile = p_row[:, None] + o_s[None, :] * WIDTH + D
    b_lse = tl.load(p_tile, mask=o_s[None, :] < b_parts[:, None], other=float("-inf"))
    b_max = tl.max(b_lse, 1)
    b_pivot = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.sum(tl.exp2(b_lse - b_pivot[:, None]), 1)

    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_out = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for o_c in range(0, splits, CHUNK):
        # other names than above: a loop may not change the shape of a variable
        o_part = o_c + tl.arange(0, CHUNK)
        m_part = o_part[None, :] < b_parts[:, None]
        p_part = p_row[:, None] + o_part[None, :] * WIDTH
        b_weight = tl.exp2(tl.load(p_part + D, mask=m_part, other=float("-inf")) - b_pivot[:, None])
        # [BLOCK_R, CHUNK, BLOCK_D] outputs of some parts
        p_values = p_part[:, :, None] + o_d[None, None, :]
        b_part = tl.load(p_values, mask=m_part[:, :, None] & m_d[None, None, :], other=0.0)
        b_out += tl.sum(b_part * b_weight[:, :, None], 1)
    b_out = b_out / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    p_row = p_out + ((o_b * query_length + o_m) * heads + o_h) * D
    tl.store(p_row[:, None] + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_r[:, None] & m_d[None, :])
    if p_lse is not None:
        tl.store(p_lse + o_r, (b_pivot + tl.log2(b_sum)) * 0.6931471805599453, mask=m_r)


class Plan(NamedTuple):
    """How the work of one call is divided, from shapes alone."""

    rows: int  # of a tile
    columns: int  # of a tile
    num_warps: int
    num_stages: int
    pack: int  # heads whose rows share a tile
    tiles_m: int  # tiles of a query block
    tiles_n: int  # tiles of a key block
    entries: int  # key blocks of a tile
    splits: int  # parts of a block list
    merge_rows: int  # rows of the output that a program of the second pass makes


def serves(query: Tensor, key: Tensor, block_mask: BlockMask, num_multiprocessors: int | None = None) -> bool:
    """Whether splitting the block lists is worth its second pass.

    It is where one program per query block would leave a GPU idle.

    Looks at shapes only: it never waits for the device, and answers the same for all masks of one size.

    Args:
        query: ``[B, S_q, H, D]``.
        key: ``[B, S_k, H_kv, D]``.
        block_mask: the mask of the call.
        num_multiprocessors: of the GPU; None asks the query's device.
    """
    plan = _plan_for(query, key, block_mask, num_multiprocessors)
    # our tiles hold 64 rows: larger query blocks read their keys more than once
    return plan.splits > plan.tiles_m


def choose_splits(programs: int, most: int, num_multiprocessors: int) -> int:
    """The fewest parts per list that fill a GPU, two programs a multiprocessor, nearly as evenly as any number does.

    Args:
        programs: how many there are without splitting.
        most: the largest number of parts.
        num_multiprocessors: of the GPU.

    >>> choose_splits(programs=64, most=128, num_multiprocessors=132)  # 256 of 264 places
    4
    >>> choose_splits(programs=300, most=128, num_multiprocessors=132), choose_splits(0, 128, 132)
    (1, 1)
    """
    places = 2 * num_multiprocessors
    if programs == 0 or 5 * programs >= 4 * places:
        return 1

    def fill(splits: int) -> float:
        waves = programs * splits / places
        return waves / math.ceil(waves)

    choices = range(1, max(1, min(most, _MOST_SPLITS)) + 1)
    enough = 0.85 * max(map(fill, choices))
    return next(splits for splits in choices if fill(splits) >= enough)


@functools.lru_cache(maxsize=4096)
def choose_plan(
    dtype: torch.dtype,
    head_dim: int,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    mask_heads: int,
    num_query_blocks: int,
    query_block_size: int,
    block_size: int,
    capacity: int,
    num_multiprocessors: int,
    shared_memory: int,
) -> Plan:
    """The plan for a call; ``capacity`` is the longest a block list can be.

    A tile has 16 to 64 rows, and as many columns as keep 64 KB of keys and values on their way to a multiprocessor
    that runs two programs: 64 at head_dim 128 in 16 bits. fp32 runs on the ordinary cores, which take whole rows of
    both operands into registers: 16 rows, 16 or 32 columns.
    """
    group = heads // kv_heads
    pack = group if mask_heads in (1, kv_heads) else 1
    rows = min(64, max(16, triton.next_power_of_2(query_block_size * pack)))
    num_stages = 3 if shared_memory >= 160 * 1024 else 2
    if dtype == torch.float32:
        rows, columns, num_stages = 16, 32 if head_dim <= 64 else 16, 2
    elif head_dim <= 64:
        columns = 128
    else:
        columns = 64 if head_dim <= 128 else 32
    block = triton.next_power_of_2(block_size)
    tiles_n = triton.cdiv(block_size, columns)
    entries = max(1, columns // block)
    tiles_m = triton.cdiv(query_block_size * pack, rows)
    programs = batch * (heads // pack) * num_query_blocks * tiles_m
    splits = choose_splits(programs, capacity * block_size // _FEWEST_KEYS, num_multiprocessors)
    num_warps = 8 if rows == 64 and head_dim > 128 else 4
    # one row a program while that does not make too many of them
    merge_rows = 1 if programs * splits < 64 * num_multiprocessors else 4
    return Plan(rows, columns, num_warps, num_stages, pack, tiles_m, tiles_n, entries, splits, merge_rows)


def _plan_for(query: Tensor, key: Tensor, mask: BlockMask, num_multiprocessors: int | None = None) -> Plan:
    _, mask_heads, num_query_blocks, capacity = mask.kv_indices.shape
    return choose_plan(
        query.dtype,
        query.shape[3],
        batch=query.shape[0],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        mask_heads=mask_heads,
        num_query_blocks=num_query_blocks,
        query_block_size=mask.largest_query_block,
        block_size=mask.block_size,
        capacity=capacity,
        num_multiprocessors=num_multiprocessors or triton_launch.num_multiprocessors(query.device),
        shared_memory=triton_launch.shared_memory(query.device),
    )


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
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Two launches: every part of every block list gives an output and an LSE in float32, then rows merge their parts.

    See ``draftattn.kernels.api.block_sparse_attention`` for the arguments; ``plan`` overrides the division of the
    work. Query heads that share a pattern and a key head are rows of one tile, so keys and values are read once. How
    lists are split depends on shapes and on their lengths alone, so results are the same on every run. Nothing is
    copied, and the host never waits for the device.
    """
    batch, query_length, heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, query_length, dtype=torch.float32, device=query.device) if return_lse else None
    if out.numel() == 0:
        return out, lse

    plan = _plan_for(query, key, block_mask) if plan is None else plan
    width = head_dim + _LSE_WIDTH
    num_rows = batch * heads * query_length
    partial = torch.empty(num_rows * plan.splits * width, dtype=torch.float32, device=query.device)
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
    mean_key = mean_value = block_map = None
    if residual is not None:
        mean_key, mean_value = contiguous_last(residual.key), contiguous_last(residual.value)
        block_map = contiguous_last(block_mask.block_map.view(torch.uint8))
    block_d = triton.next_power_of_2(head_dim)

    with torch.cuda.device_of(query):
        if block_mask.num_query_blocks:
            grid = (heads // plan.pack, block_mask.num_query_blocks * plan.tiles_m, batch * plan.splits)
            decode_kernel[grid](
                query, key, value, partial,
                counts, ids, query_offsets, key_offsets, shifts, whole, starts, mean_key, mean_value, block_map,
                *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
                *shared_strides(counts, 2), *shared_strides(ids, 3), item_stride(key_offsets), item_stride(shifts),
                *shared_strides(whole, 3), item_stride(starts), starts_stride,
                *shared_strides(mean_key, 3), *shared_strides(mean_value, 3), *shared_strides(block_map, 3),
                scale * _LOG2_E, size, sink, query_length, key.shape[1],
                block_mask.num_query_blocks, block_mask.num_key_blocks, plan.splits,
                GROUP=heads // key.shape[2], PACK=plan.pack, D=head_dim, BLOCK_D=block_d,
                BLOCK_M=plan.rows, BLOCK_N=plan.columns, TILES_M=plan.tiles_m, TILES_N=plan.tiles_n,
                ENTRIES=plan.entries, WIDTH=width, CAUSAL=causal, WINDOW=window is not None,
                num_warps=plan.num_warps, num_stages=plan.num_stages,
            )  # fmt: skip
        block_s = triton.next_power_of_2(plan.splits)
        merge_splits_kernel[(triton.cdiv(num_rows, plan.merge_rows),)](
            partial, out, lse, query_offsets,
            num_rows, query_length, block_mask.num_query_blocks, heads, plan.splits,
            D=head_dim, BLOCK_D=block_d, BLOCK_R=plan.merge_rows, BLOCK_S=block_s, CHUNK=min(16, block_s), WIDTH=width,
            num_warps=4,
        )  # fmt: skip
    return out, lse
