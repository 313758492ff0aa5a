"""Means over ragged blocks of tokens, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # tokens summed at a time


@triton.jit
def pool_blocks_kernel(
    p_x, p_offsets, p_out,
    stride_xb, stride_xs, stride_xh, stride_xd, stride_offsets_b, stride_out_b, stride_out_n, stride_out_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One block of one head per program."""
    i_n = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    start = tl.load(p_offsets + i_b * stride_offsets_b + i_n)
    end = tl.load(p_offsets + i_b * stride_offsets_b + i_n + 1)
    o_d = tl.arange(0, BLOCK_D)
    p_x += i_b * stride_xb + i_h * stride_xh
    # [BLOCK_D] sums
    b_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for o_row in range(0, BLOCK_S, ROWS):
        o_s = start + o_row + tl.arange(0, ROWS)
        m_x = (o_s < end)[:, None] & (o_d < D)[None, :]
        # [ROWS, BLOCK_D] tokens
        b_x = tl.load(p_x + o_s.to(tl.int64)[:, None] * stride_xs + o_d[None, :] * stride_xd, mask=m_x, other=0.0)
        b_sum += tl.sum(b_x.to(tl.float32), 0)
    b_mean = b_sum / tl.maximum(end - start, 1).to(tl.float32)
    tl.store(p_out + i_b * stride_out_b + i_n * stride_out_n + i_h * stride_out_h + o_d, b_mean, mask=o_d < D)


def pool_blocks(x: Tensor, offsets: Tensor, block_size: int = 128) -> Tensor:
    """``draftattn.kernels.pooling.pool_blocks`` for fp16, bf16 and fp32; reads ``x`` once, whatever its strides."""
    batch, _, heads, head_dim = x.shape
    num_blocks = offsets.shape[-1] - 1
    out = torch.empty(batch, num_blocks, heads, head_dim, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    offsets = offsets.contiguous()
    with torch.cuda.device_of(x):
        pool_blocks_kernel[(num_blocks, heads, batch)](
            x, offsets, out,
            *x.stride(), offsets.stride(0) if offsets.ndim == 2 else 0, *out.stride()[:3],
            D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_S=triton.next_power_of_2(block_size), ROWS=_ROWS,
        )  # fmt: skip
    return out
