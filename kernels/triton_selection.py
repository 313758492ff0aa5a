"""Choosing blocks and listing them, in Triton: a row of scores per program, without sorting.

Floats are compared through unsigned integers of the same order. The smallest score of the largest ``k`` is found bit by
bit, by counting how many scores are at least a candidate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_DIGIT_BITS = 8
_PASSES = 32 // _DIGIT_BITS
_DENSITY_ROWS = 16  # whose pairs a program adds up
_CHUNK = 8192  # scores that a program sorts into digits
_OWN = tl.constexpr(0xFFFFFFFF)  # the key of a row's own block, above that of any number


@triton.jit
def _ordered_key(b_x):
    """uint32 in the order of the floats: zeros are equal, NaN counts as infinity, -inf and only that gives 0."""
    b_x = tl.where(b_x != b_x, float("inf"), b_x)
    b_x = tl.where(b_x == 0.0, 0.0, b_x)
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_sign = tl.full(b_bits.shape, 0x80000000, tl.uint32)
    b_ones = tl.full(b_bits.shape, 0xFFFFFFFF, tl.uint32)
    b_key = tl.where(b_bits >= b_sign, b_bits ^ b_ones, b_bits | b_sign)
    return tl.where(b_x == float("-inf"), 0, b_key)


@triton.jit
def _write_row(i_row, b_keep, o_k, p_counts, p_ids, p_map, num_columns, capacity):
    """Lists the kept columns of a row from the left, in ascending order, and zeros after them."""
    # [BLOCK_K] place of each kept column in the list, from 1
    b_rank = tl.cumsum(b_keep.to(tl.int32), 0)
    count = tl.minimum(tl.sum(b_keep.to(tl.int32), 0), capacity)
    p_ids += i_row * capacity
    tl.store(p_ids + b_rank - 1, o_k, mask=b_keep & (b_rank <= capacity))
    tl.store(p_ids + o_k, tl.zeros_like(o_k), mask=(o_k >= count) & (o_k < capacity))
    tl.store(p_counts + i_row, count)
    if p_map is not None:
        tl.store(p_map + i_row * num_columns + o_k, b_keep.to(tl.uint8), mask=o_k < num_columns)


@triton.jit
def select_largest_kernel(
    p_scores, p_bias, p_counts, p_ids, p_map,
    num_rows, num_columns, num_columns_out, num_kept, capacity,
    KEEP_DIAGONAL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row per program: its ``num_kept`` largest scores, of equal ones the first."""
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    # rows and columns of the tail have no scores: they are dense
    num_scored = tl.where(i_q < num_rows, num_columns, 0)
    m_k = o_k < num_scored
    p_scores += (i_bh * num_rows + i_q) * num_columns
    b_score = tl.load(p_scores + o_k, mask=m_k, other=float("-inf")).to(tl.float32)
    if p_bias is not None:
        b_score += tl.load(p_bias + o_k, mask=m_k, other=0.0)
    b_key = _ordered_key(b_score)
    if KEEP_DIAGONAL:
        b_key = tl.where((o_k == i_q) & m_k, _OWN, b_key)
    kept = tl.minimum(num_kept, tl.sum((b_key != 0).to(tl.int32), 0))

    # the bits of the largest threshold that at least `kept` keys reach; done when exactly `kept` do
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    reached = tl.full((), BLOCK_K, tl.int32)
    while (bit != 0) & (reached != kept):
        candidate = threshold | bit
        count = tl.sum((b_key >= candidate).to(tl.int32), 0)
        threshold = tl.where(count >= kept, candidate, threshold)
        reached = tl.where(count >= kept, count, reached)
        bit = bit >> 1

    b_keep = b_key >= threshold
    if reached != kept:
        # of equal scores at the threshold the first ones fill what room is left
        b_above = b_key > threshold
        b_equal = b_key == threshold
        room = kept - tl.sum(b_above.to(tl.int32), 0)
        b_keep = b_above | (b_equal & (tl.cumsum(b_equal.to(tl.int32), 0) <= room))
    b_keep = (b_keep & m_k) | ((o_k >= num_scored) & (o_k < num_columns_out))
    i_row = i_bh * tl.num_programs(0) + i_q
    _write_row(i_row, b_keep, o_k, p_counts, p_ids, p_map, num_columns_out, capacity)


@triton.jit
def _descend(p_histogram, rank, DIGITS: tl.constexpr):
    """The digit that holds the ``rank``-th smallest entry (from 1), and the entry's rank within it."""
    o_digit = tl.arange(0, DIGITS)
    b_until = tl.cumsum(tl.load(p_histogram + o_digit), 0)
    before = b_until < rank
    return tl.sum(before.to(tl.int32), 0), rank - tl.max(tl.where(before, b_until, 0), 0)


@triton.jit
def _find_prefix(p_histograms, rank, PASSES: tl.constexpr, BITS: tl.constexpr):
    """The leading digits of the ``rank``-th smallest key, and its rank among the keys that share them."""
    prefix = tl.full((), 0, tl.uint32)
    for i_pass in tl.static_range(PASSES):
        digit, rank = _descend(p_histograms + i_pass * (1 << BITS), rank, 1 << BITS)
        prefix = (prefix << BITS) | digit.to(tl.uint32)
    return prefix, rank


@triton.jit
def count_digits_kernel(
    p_scores, p_histograms, num_scores, rank,
    PASS: tl.constexpr, PASSES: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Counts the digit PASS of the keys whose earlier digits are those of the ``rank``-th smallest."""
    i_c = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    p_histograms += i_bh * (PASSES << BITS)
    prefix, rank = _find_prefix(p_histograms, rank, PASS, BITS)
    o_s = i_c * CHUNK + tl.arange(0, CHUNK)
    m_s = o_s < num_scores
    b_key = _ordered_key(tl.load(p_scores + i_bh * num_scores + o_s, mask=m_s, other=0.0))
    if PASS > 0:
        m_s = m_s & ((b_key >> (32 - BITS * PASS)) == prefix)
    b_digit = (b_key >> (32 - BITS - BITS * PASS)) & ((1 << BITS) - 1)
    # others are counted as the digit 0 and taken off again
    b_count = tl.histogram(tl.where(m_s, b_digit, 0).to(tl.int32), 1 << BITS)
    o_digit = tl.arange(0, 1 << BITS)
    b_count -= tl.where(o_digit == 0, CHUNK - tl.sum(m_s.to(tl.int32), 0), 0)
    tl.atomic_add(p_histograms + PASS * (1 << BITS) + o_digit, b_count, mask=b_count != 0)


@triton.jit
def select_from_rank_kernel(
    p_scores, p_histograms, p_counts, p_ids, p_map,
    num_rows, num_columns, num_columns_out, rank, capacity,
    PASSES: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row per program: its scores from the ``rank``-th smallest of the head on, or else its largest."""
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    # rows and columns of the tail have no scores: they are dense
    num_scored = tl.where(i_q < num_rows, num_columns, 0)
    m_k = o_k < num_scored
    p_scores += (i_bh * num_rows + i_q) * num_columns
    b_key = _ordered_key(tl.load(p_scores + o_k, mask=m_k, other=float("-inf")))
    threshold, rank = _find_prefix(p_histograms + i_bh * (PASSES << BITS), rank, PASSES, BITS)
    threshold = tl.minimum(threshold, tl.max(b_key, 0))
    b_keep = ((b_key >= threshold) & m_k) | ((o_k >= num_scored) & (o_k < num_columns_out))
    i_row = i_bh * tl.num_programs(0) + i_q
    _write_row(i_row, b_keep, o_k, p_counts, p_ids, p_map, num_columns_out, capacity)


@triton.jit
def list_blocks_kernel(p_map, p_counts, p_ids, num_columns, capacity, BLOCK_K: tl.constexpr):
    """One row of a boolean map per program."""
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    b_keep = tl.load(p_map + i_row * num_columns + o_k, mask=o_k < num_columns, other=0) != 0
    _write_row(i_row, b_keep, o_k, p_counts, p_ids, None, num_columns, capacity)


@triton.jit
def density_kernel(
    p_counts, p_ids, p_query_offsets, p_key_offsets, p_shares,
    heads, num_rows, num_columns, capacity, stride_mask_b, stride_key_offsets_b,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The share of all pairs that lie in the listed blocks of a few rows."""
    i_r, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_key_offsets += i_b * stride_key_offsets_b
    o_r = i_r * ROWS + tl.arange(0, ROWS)
    m_r = o_r < num_rows
    o_row = i_b * stride_mask_b + i_h.to(tl.int64) * num_rows + o_r
    b_count = tl.load(p_counts + o_row, mask=m_r, other=0)
    b_queries = tl.load(p_query_offsets + o_r + 1, mask=m_r, other=0) - tl.load(
        p_query_offsets + o_r, mask=m_r, other=0
    )
    # [ROWS, BLOCK_C] lengths of listed blocks
    b_keys = tl.zeros((ROWS, BLOCK_C), dtype=tl.int32)
    for o_start in range(0, tl.max(b_count, 0), BLOCK_C):
        o_c = o_start + tl.arange(0, BLOCK_C)[None, :]
        m_c = o_c < b_count[:, None]
        b_id = tl.load(p_ids + o_row[:, None] * capacity + o_c, mask=m_c, other=0)
        b_key_end = tl.load(p_key_offsets + b_id + 1, mask=m_c, other=0)
        b_keys += b_key_end - tl.load(p_key_offsets + b_id, mask=m_c, other=0)
    pairs = tl.sum(tl.sum(b_keys, 1).to(tl.int64) * b_queries, 0).to(tl.float64)
    queries = (tl.load(p_query_offsets + num_rows) - tl.load(p_query_offsets)).to(tl.float64)
    keys = (tl.load(p_key_offsets + num_columns) - tl.load(p_key_offsets)).to(tl.float64)
    items = (tl.num_programs(2) * heads).to(tl.float64)
    i_program = (i_b * heads + i_h) * tl.num_programs(0) + i_r
    tl.store(p_shares + i_program, pairs / (queries * keys * items))


def select_largest(
    scores: Tensor, num_kept: int, bias: Tensor | None, keep_diagonal: bool, dense_tail: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``draftattn.kernels.selection.select_largest``; the outputs are its ``kv_num_blocks``, ``kv_indices``, map."""
    num_rows, num_columns = scores.shape[2:]
    outputs, block = _empty_outputs(scores, dense_tail, num_kept if dense_tail == 0 else num_columns + dense_tail)
    counts, ids, block_map = outputs
    if counts.numel():
        with torch.cuda.device_of(scores):
            select_largest_kernel[(counts.shape[2], counts.shape[0] * counts.shape[1])](
                scores.contiguous(), None if bias is None else bias.contiguous(),
                counts, ids, block_map.view(torch.uint8),
                num_rows, num_columns, num_columns + dense_tail, num_kept, ids.shape[-1],
                KEEP_DIAGONAL=keep_diagonal, BLOCK_K=block, num_warps=_num_warps(block),
            )  # fmt: skip
    return outputs


def select_from_rank(scores: Tensor, rank: int, dense_tail: int) -> tuple[Tensor, Tensor, Tensor]:
    """``draftattn.kernels.selection.select_from_rank``, for a rank of at least 1."""
    num_rows, num_columns = scores.shape[2:]
    outputs, block = _empty_outputs(scores, dense_tail, num_columns + dense_tail)
    counts, ids, block_map = outputs
    if counts.numel() == 0:
        return outputs
    heads, num_scores = scores.shape[0] * scores.shape[1], num_rows * num_columns
    scores = scores.contiguous()
    histograms = torch.zeros(heads, _PASSES, 1 << _DIGIT_BITS, dtype=torch.int32, device=scores.device)
    constants = dict(PASSES=_PASSES, BITS=_DIGIT_BITS)
    with torch.cuda.device_of(scores):
        for i_pass in range(_PASSES):
            count_digits_kernel[(triton.cdiv(num_scores, _CHUNK), heads)](
                scores, histograms, num_scores, rank, PASS=i_pass, CHUNK=_CHUNK, num_warps=8, **constants
            )
        select_from_rank_kernel[(counts.shape[2], heads)](
            scores, histograms, counts, ids, block_map.view(torch.uint8),
            num_rows, num_columns, num_columns + dense_tail, rank, ids.shape[-1],
            BLOCK_K=block, num_warps=_num_warps(block), **constants,
        )  # fmt: skip
    return outputs


def list_blocks(block_map: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """``draftattn.kernels.selection.list_blocks``."""
    counts = torch.empty(block_map.shape[:3], dtype=torch.int32, device=block_map.device)
    ids = torch.empty(*block_map.shape[:3], capacity, dtype=torch.int32, device=block_map.device)
    if counts.numel():
        block = triton.next_power_of_2(max(block_map.shape[-1], capacity))
        with torch.cuda.device_of(block_map):
            list_blocks_kernel[(counts.numel(),)](
                block_map.contiguous().view(torch.uint8), counts, ids, block_map.shape[-1], capacity,
                BLOCK_K=block, num_warps=_num_warps(block),
            )  # fmt: skip
    return counts, ids


def density_of_lists(kv_num_blocks: Tensor, kv_indices: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> Tensor:
    """``draftattn.kernels.selection.density_of_lists``."""
    batch, heads, rows, capacity = kv_indices.shape
    batch_out = max(batch, key_offsets.shape[0] if key_offsets.ndim == 2 else 1)
    grid = (triton.cdiv(rows, _DENSITY_ROWS), heads, batch_out)
    shares = torch.empty(grid, dtype=torch.float64, device=kv_indices.device)
    if shares.numel():
        with torch.cuda.device_of(shares):
            density_kernel[grid](
                kv_num_blocks.contiguous(), kv_indices.contiguous(), query_offsets, key_offsets.contiguous(), shares,
                heads, rows, key_offsets.shape[-1] - 1, capacity,
                heads * rows if batch > 1 else 0, key_offsets.shape[-1] if key_offsets.ndim == 2 else 0,
                ROWS=_DENSITY_ROWS, BLOCK_C=128, num_warps=4,
            )  # fmt: skip
    return shares.sum()


def _empty_outputs(scores: Tensor, dense_tail: int, capacity: int) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """Counts, lists and map, and the power of two that spans a row of them."""
    batch, heads, rows, columns = scores.shape
    rows, columns = rows + dense_tail, columns + dense_tail
    counts = torch.empty(batch, heads, rows, dtype=torch.int32, device=scores.device)
    ids = torch.empty(batch, heads, rows, capacity, dtype=torch.int32, device=scores.device)
    block_map = torch.empty(batch, heads, rows, columns, dtype=torch.bool, device=scores.device)
    return (counts, ids, block_map), triton.next_power_of_2(max(columns, 1))


def _num_warps(block: int) -> int:
    # 32 numbers a thread: of the rows met in practice, each is one warp's, which counts without a barrier
    return min(max(block // 1024, 1), 32)
