"""Scores that rows share a budget by, in Triton: a row per program, read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["num_rows", "num_columns", "first"])
def budget_scores_kernel(p_scores, p_out, num_rows, num_columns, first, BLOCK_K: tl.constexpr):
    """One row of blocks of one head per program."""
    i_row = tl.program_id(0).to(tl.int64)
    own = first + (i_row % num_rows).to(tl.int32)
    o_k = tl.arange(0, BLOCK_K)
    b_score = tl.load(p_scores + i_row * num_columns + o_k, mask=o_k <= own, other=float("-inf"))
    m_forced = (o_k == 0) | (o_k == own)
    best = tl.max(tl.where(m_forced, float("-inf"), b_score), 0)
    # a row without a choice has no best block
    best = tl.where(best == float("-inf"), 0.0, best)
    pivot = tl.max(b_score, 0)
    lse = pivot + tl.log(tl.sum(tl.exp(b_score - pivot), 0))
    b_out = tl.where(m_forced, float("inf"), b_score - (lse + best) * 0.5)
    tl.store(p_out + i_row * num_columns + o_k, b_out, mask=o_k < num_columns)


def budget_scores(scores: Tensor, first: int) -> Tensor:
    """``draftattn.kernels.causal_budget.budget_scores``."""
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    rows, columns = scores.shape[-2:]
    if out.numel():
        block = triton.next_power_of_2(columns)
        with torch.cuda.device_of(scores):
            budget_scores_kernel[(out.numel() // columns,)](
                scores, out, rows, columns, first, BLOCK_K=block, num_warps=min(max(block // 512, 1), 16)
            )
    return out
