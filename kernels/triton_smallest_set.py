"""The fewest entries of a row that hold a share of its sum, in Triton: a row per program, without sorting.

Floats that are not negative compare as their bits do. The smallest kept score is found bit by bit, by adding up what
lies above a candidate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_COLUMNS = 16_384  # of a row that a program holds in registers
_CHUNK = 4096  # columns that a program reads at a time of a longer row
_ANY_VALUE = ["size_1", "size_2", "min_kept"]


@triton.jit
def _forced_row(p_forced, i_row, stride_f0, stride_f1, stride_f2, size_1, size_2):
    i_2, i_1, i_0 = i_row % size_2, i_row // size_2 % size_1, i_row // (size_2 * size_1)
    return p_forced + i_0 * stride_f0 + i_1 * stride_f1 + i_2 * stride_f2


@triton.jit
def _load(p_scores, p_forced, stride_f3, o_k, num_columns):
    """Scores that compete for the share, scores that are forced, and which these are."""
    m_k = o_k < num_columns
    b_score = tl.load(p_scores + o_k, mask=m_k, other=0.0)
    # the bits of a negative zero would be those of a large number
    b_score = tl.where(b_score > 0.0, b_score, 0.0)
    if p_forced is not None:
        b_forced = tl.load(p_forced + o_k.to(tl.int64) * stride_f3, mask=m_k, other=0) != 0
        return tl.where(b_forced, 0.0, b_score), tl.where(b_forced, b_score, 0.0), b_forced
    return b_score, tl.zeros_like(b_score), o_k < 0


@triton.jit
def _reaching(b_score, candidate):
    return b_score.to(tl.uint32, bitcast=True) >= candidate


@triton.jit
def _held(p_scores, p_forced, stride_f3, num_columns, threshold, step, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):
    """Sums and numbers of a row's competing scores from one, two and three steps above a threshold on."""
    b_mass_1, b_mass_2 = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    b_count_1, b_count_2 = tl.zeros((BLOCK_K,), tl.int32), tl.zeros((BLOCK_K,), tl.int32)
    b_mass_3, b_count_3 = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.int32)
    for start in tl.range(0, num_columns, BLOCK_K, num_stages=STAGES):
        o_k = start + tl.arange(0, BLOCK_K)
        b_score, _, _ = _load(p_scores, p_forced, stride_f3, o_k, num_columns)
        b_above = _reaching(b_score, threshold + step)
        b_mass_1 += tl.where(b_above, b_score, 0.0)
        b_count_1 += b_above.to(tl.int32)
        b_above = _reaching(b_score, threshold + 2 * step)
        b_mass_2 += tl.where(b_above, b_score, 0.0)
        b_count_2 += b_above.to(tl.int32)
        b_above = _reaching(b_score, threshold + 3 * step)
        b_mass_3 += tl.where(b_above, b_score, 0.0)
        b_count_3 += b_above.to(tl.int32)
    masses = tl.sum(b_mass_1, 0), tl.sum(b_mass_2, 0), tl.sum(b_mass_3, 0)
    return masses, (tl.sum(b_count_1, 0), tl.sum(b_count_2, 0), tl.sum(b_count_3, 0))


@triton.jit
def _mark(b_score, b_forced, threshold, mass, count, equals, target, min_kept):
    """Kept entries: of scores equal to the threshold, ``equals`` of which came before, the first ones that it takes."""
    b_key = b_score.to(tl.uint32, bitcast=True)
    b_equal = (b_key == threshold) & (b_key > 0)
    b_rank = equals + tl.cumsum(b_equal.to(tl.int32), 0) - 1
    b_wanted = (mass + b_rank.to(tl.float32) * b_score < target) | (count + b_rank < min_kept)
    return b_forced | (b_key > threshold) | (b_equal & b_wanted), b_equal


@triton.jit(do_not_specialize=_ANY_VALUE)
def smallest_set_kernel(
    p_scores, p_forced, p_kept,
    stride_f0, stride_f1, stride_f2, stride_f3, size_1, size_2, num_columns, share, min_kept,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row per program: its forced scores, and the largest of the others until they hold the share."""
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    if p_forced is not None:
        p_forced = _forced_row(p_forced, i_row, stride_f0, stride_f1, stride_f2, size_1, size_2)
    b_score, b_forced_score, b_forced = _load(p_scores + i_row * num_columns, p_forced, stride_f3, o_k, num_columns)
    forced_mass, forced_count = tl.sum(b_forced_score, 0), tl.sum(b_forced.to(tl.int32), 0)
    target = share * (forced_mass + tl.sum(b_score, 0))

    # the smallest threshold above which entries still miss the share, or are too few
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 30, tl.uint32)
    while bit != 0:
        b_above = _reaching(b_score, threshold | bit)
        enough = forced_mass + tl.sum(tl.where(b_above, b_score, 0.0), 0) >= target
        enough = enough & (forced_count + tl.sum(b_above.to(tl.int32), 0) >= min_kept)
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    b_above = _reaching(b_score, threshold + 1)
    mass = forced_mass + tl.sum(tl.where(b_above, b_score, 0.0), 0)
    count = forced_count + tl.sum(b_above.to(tl.int32), 0)
    b_kept, _ = _mark(b_score, b_forced, threshold, mass, count, 0, target, min_kept)
    tl.store(p_kept + i_row * num_columns + o_k, b_kept.to(tl.uint8), mask=o_k < num_columns)


@triton.jit(do_not_specialize=_ANY_VALUE)
def smallest_set_of_long_rows_kernel(
    p_scores, p_forced, p_kept,
    stride_f0, stride_f1, stride_f2, stride_f3, size_1, size_2, num_columns, share, min_kept,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for rows that are read again for every two bits of the threshold."""
    i_row = tl.program_id(0).to(tl.int64)
    if p_forced is not None:
        p_forced = _forced_row(p_forced, i_row, stride_f0, stride_f1, stride_f2, size_1, size_2)
    p_scores += i_row * num_columns
    p_kept += i_row * num_columns
    b_mass, b_forced_mass = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    b_count = tl.zeros((BLOCK_K,), tl.int32)
    for start in tl.range(0, num_columns, BLOCK_K, num_stages=STAGES):
        o_k = start + tl.arange(0, BLOCK_K)
        b_score, b_forced_score, b_forced = _load(p_scores, p_forced, stride_f3, o_k, num_columns)
        b_mass += b_score
        b_forced_mass += b_forced_score
        b_count += b_forced.to(tl.int32)
    forced_mass, forced_count = tl.sum(b_forced_mass, 0), tl.sum(b_count, 0)
    target = share * (forced_mass + tl.sum(b_mass, 0))

    # two bits of the threshold at a time
    threshold = tl.full((), 0, tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    while step != 0:
        reached = tl.full((), 0, tl.uint32)
        masses, counts = _held(p_scores, p_forced, stride_f3, num_columns, threshold, step, BLOCK_K, STAGES)
        for i_c in tl.static_range(3):
            enough = (forced_mass + masses[i_c] >= target) & (forced_count + counts[i_c] >= min_kept)
            reached += enough.to(tl.uint32)
        threshold += reached * step
        step = step >> 2
    masses, counts = _held(p_scores, p_forced, stride_f3, num_columns, threshold, 1, BLOCK_K, STAGES)
    mass, count = forced_mass + masses[0], forced_count + counts[0]
    equals = tl.full((), 0, tl.int32)
    for start in tl.range(0, num_columns, BLOCK_K, num_stages=STAGES):
        o_k = start + tl.arange(0, BLOCK_K)
        b_score, _, b_forced = _load(p_scores, p_forced, stride_f3, o_k, num_columns)
        b_kept, b_equal = _mark(b_score, b_forced, threshold, mass, count, equals, target, min_kept)
        tl.store(p_kept + o_k, b_kept.to(tl.uint8), mask=o_k < num_columns)
        equals += tl.sum(b_equal.to(tl.int32), 0)


def smallest_set(scores: Tensor, mass: float, forced: Tensor | None = None, min_kept: int = 0) -> Tensor:
    """See ``draftattn.kernels.smallest_set.smallest_set``; for fp32 of at most four dimensions."""
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if kept.numel() == 0:
        return kept
    scores = scores.contiguous()
    num_columns = scores.shape[-1]
    shape = (1,) * (4 - scores.ndim) + tuple(scores.shape)
    forced = None if forced is None else forced.view(torch.uint8).expand(shape)
    arguments = (
        scores, forced, kept.view(torch.uint8), *((0, 0, 0, 0) if forced is None else forced.stride()),
        shape[1], shape[2], num_columns, mass, min_kept,
    )  # fmt: skip
    grid = (scores.numel() // num_columns,)
    with torch.cuda.device_of(scores):
        if num_columns <= _MAX_COLUMNS:
            block = triton.next_power_of_2(num_columns)
            smallest_set_kernel[grid](*arguments, BLOCK_K=block, num_warps=min(max(block // 1024, 1), 16))
        else:
            smallest_set_of_long_rows_kernel[grid](*arguments, BLOCK_K=_CHUNK, STAGES=4, num_warps=16)
    return kept
