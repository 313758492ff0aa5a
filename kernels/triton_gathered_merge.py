"""Merging scattered parts of attention in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import contiguous_last


@triton.jit
def gathered_merge_kernel(
    p_own, p_own_lse, p_parts, p_part_lses, p_place, p_out,
    stride_os, stride_oh, stride_lh, stride_ls, stride_ps, length,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows per program; a row is a query and a head, a query's heads side by side."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < length * HEADS
    o_t, o_h = o_r // HEADS, o_r % HEADS
    o_d = tl.arange(0, BLOCK_D)
    m_d = m_r[:, None] & (o_d < D)[None, :]
    # [BLOCK_R] maxima and sums of the weights so far
    b_max = tl.load(p_own_lse + o_h * stride_lh + o_t * stride_ls, mask=m_r, other=0.0).to(tl.float32)
    # a row that saw nothing so far has the weight 0, whatever it is divided by
    b_sum = tl.where(b_max == float("-inf"), 0.0, 1.0)
    # [BLOCK_R, BLOCK_D] weighted outputs so far
    b_acc = tl.load(p_own + (o_t * stride_os + o_h * stride_oh)[:, None] + o_d[None, :], mask=m_d, other=0.0)
    b_acc = b_acc.to(tl.float32) * b_sum[:, None]
    for i_s in range(SLOTS):
        o_part = tl.load(p_place + o_r * SLOTS + i_s, mask=m_r, other=0)
        b_lse = tl.load(p_part_lses + o_part, mask=m_r, other=float("-inf")).to(tl.float32)
        b_new_max = tl.maximum(b_max, b_lse)
        b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_rescale = tl.exp(b_max - b_pivot)
        b_weight = tl.exp(b_lse - b_pivot)
        b_part = tl.load(p_parts + o_part[:, None] * stride_ps + o_d[None, :], mask=m_d, other=0.0)
        b_acc = b_acc * b_rescale[:, None] + b_weight[:, None] * b_part.to(tl.float32)
        b_sum = b_sum * b_rescale + b_weight
        b_max = b_new_max
    b_acc = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    tl.store(p_out + o_r[:, None] * D + o_d[None, :], b_acc.to(p_out.dtype.element_ty), mask=m_d)


def merge_gathered(output: Tensor, lse: Tensor, parts: Tensor, part_lses: Tensor, place: Tensor) -> Tensor:
    """See ``draftattn.kernels.gathered_merge.merge_gathered``."""
    length, heads, head_dim = output.shape
    output, parts, place = contiguous_last(output), contiguous_last(parts), place.contiguous()
    merged = torch.empty(length, heads, head_dim, dtype=output.dtype, device=output.device)
    if merged.numel() == 0:
        return merged
    block_d = triton.next_power_of_2(head_dim)
    block_r = max(1, 4096 // block_d)
    gathered_merge_kernel[(triton.cdiv(length * heads, block_r),)](
        output, lse, parts, part_lses.contiguous(), place, merged,
        output.stride(0), output.stride(1), lse.stride(0), lse.stride(1), parts.stride(0), length,
        HEADS=heads, D=head_dim, BLOCK_D=block_d, SLOTS=place.shape[2], BLOCK_R=block_r, num_warps=8,
    )  # fmt: skip
    return merged
