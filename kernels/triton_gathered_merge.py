"""Merging scattered parts of attention in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import contiguous_last


@triton.jit(do_not_specialize=["kv_heads", "num_rows"])
def gathered_merge_kernel(
    p_own, p_own_lse, p_parts, p_part_lses, p_place, p_out,
    stride_ob, stride_os, stride_oh, stride_lb, stride_lh, stride_ls, stride_ps, stride_mb, stride_ms, stride_mh,
    kv_heads, num_rows,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of a key head per program; a row is a query and a head, a query's heads side by side."""
    i_u = tl.program_id(1).to(tl.int64)
    i_b = i_u // kv_heads
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_rows
    o_t = (o_r // GROUP).to(tl.int64)
    o_h = (i_u % kv_heads) * GROUP + o_r % GROUP
    o_d = tl.arange(0, BLOCK_D)
    m_d = m_r[:, None] & (o_d < D)[None, :]
    # [BLOCK_R] maxima and sums of the weights so far
    p_own_lse += i_b * stride_lb + o_h * stride_lh + o_t * stride_ls
    b_max = tl.load(p_own_lse, mask=m_r, other=0.0).to(tl.float32)
    # a row that saw nothing so far has the weight 0, whatever it is divided by
    b_sum = tl.where(b_max == float("-inf"), 0.0, 1.0)
    # [BLOCK_R, BLOCK_D] weighted outputs so far
    p_own += i_b * stride_ob + o_t * stride_os + o_h * stride_oh
    b_acc = tl.load(p_own[:, None] + o_d[None, :], mask=m_d, other=0.0)
    b_acc = b_acc.to(tl.float32) * b_sum[:, None]
    p_place += i_u * SLOTS * num_rows + o_r
    for _ in range(SLOTS):
        o_part = tl.load(p_place, mask=m_r, other=0).to(tl.int64)
        p_place += num_rows
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
    p_out += i_b * stride_mb + o_t * stride_ms + o_h * stride_mh
    tl.store(p_out[:, None] + o_d[None, :], b_acc.to(p_out.dtype.element_ty), mask=m_d)


def merge_gathered(
    output: Tensor, lse: Tensor, parts: Tensor, part_lses: Tensor, place: Tensor, out: Tensor | None = None
) -> Tensor:
    """See ``draftattn.kernels.gathered_merge.merge_gathered``."""
    batch, length, _, head_dim = output.shape
    kv_heads, slots, _, group = place.shape[1:]
    output, parts = contiguous_last(output), contiguous_last(parts)
    if out is not None and out.stride(-1) != 1:
        return out.copy_(merge_gathered(output, lse, parts, part_lses, place))
    if out is None:
        out = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    if out.numel() == 0:
        return out
    block_d = triton.next_power_of_2(head_dim)
    block_r = max(1, 4096 // block_d)
    with torch.cuda.device_of(output):
        gathered_merge_kernel[(triton.cdiv(length * group, block_r), batch * kv_heads)](
            output, lse, parts, part_lses.contiguous(), place.contiguous(), out,
            *output.stride()[:3], *lse.stride(), parts.stride(0), *out.stride()[:3], kv_heads, length * group,
            GROUP=group, D=head_dim, BLOCK_D=block_d, SLOTS=slots, BLOCK_R=block_r, num_warps=8,
        )  # fmt: skip
    return out
