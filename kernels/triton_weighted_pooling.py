"""Means of the keys and values of ragged blocks, weighted along a direction, in Triton: one launch for both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # numbers of a tile of keys
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_blocks", "heads", "stride_offsets_b"])
def pool_weighted_kernel(
    p_k, p_v, p_direction, p_mean_k, p_mean_v, p_offsets,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    num_blocks, heads, stride_offsets_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One block of one head per program: an online softmax over its tokens, reading keys and values once."""
    # programs that run together read the heads of one block, which are neighbours in memory
    i_h = tl.program_id(0) % heads
    i_n = tl.program_id(0) // heads % num_blocks
    i_b = (tl.program_id(0) // heads // num_blocks).to(tl.int64)
    p_offsets += i_b * stride_offsets_b + i_n
    start = tl.load(p_offsets)
    end = tl.load(p_offsets + 1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_direction = tl.load(p_direction + (i_b * heads + i_h) * D + o_d, mask=m_d, other=0.0)
    p_k += i_b * stride_kb + i_h.to(tl.int64) * stride_kh
    p_v += i_b * stride_vb + i_h.to(tl.int64) * stride_vh
    b_mean_k = tl.zeros((BLOCK_D,), dtype=tl.float32)
    b_mean_v = tl.zeros((BLOCK_D,), dtype=tl.float32)
    # the first score is finite wherever there is a token, and weights of none are not used
    b_max = float("-inf")
    b_sum = 0.0
    for o_row in tl.static_range(0, BLOCK_S, ROWS):
        o_s = start + o_row + tl.arange(0, ROWS)
        m_s = o_s < end
        m_x = m_s[:, None] & m_d[None, :]
        o_s = o_s.to(tl.int64)[:, None]
        # [ROWS, BLOCK_D] keys and values
        b_k = tl.load(p_k + o_s * stride_ks + o_d[None, :] * stride_kd, mask=m_x, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_s * stride_vs + o_d[None, :] * stride_vd, mask=m_x, other=0.0).to(tl.float32)
        # [ROWS] scores
        b_s = tl.where(m_s, tl.sum(b_k * b_direction[None, :], 1), float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 0))
        b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_w = tl.exp(b_s - b_pivot)
        b_rescale = tl.exp(b_max - b_pivot)
        b_sum = b_sum * b_rescale + tl.sum(b_w, 0)
        b_mean_k = b_mean_k * b_rescale + tl.sum(b_w[:, None] * b_k, 0)
        b_mean_v = b_mean_v * b_rescale + tl.sum(b_w[:, None] * b_v, 0)
        b_max = b_new_max

    b_norm = tl.where(b_sum == 0.0, 1.0, b_sum)
    o_out = ((i_b * num_blocks + i_n) * heads + i_h) * D + o_d
    tl.store(p_mean_k + o_out, (b_mean_k / b_norm).to(p_mean_k.dtype.element_ty), mask=m_d)
    tl.store(p_mean_v + o_out, (b_mean_v / b_norm).to(p_mean_v.dtype.element_ty), mask=m_d)


def pool_weighted(
    key: Tensor, value: Tensor, direction: Tensor, offsets: Tensor, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """``draftattn.kernels.weighted_pooling.pool_weighted`` for fp16, bf16 and fp32."""
    batch, _, heads, head_dim = key.shape
    num_blocks = offsets.shape[-1] - 1
    mean_key, mean_value = (
        torch.empty(batch, num_blocks, heads, head_dim, dtype=key.dtype, device=key.device) for _ in range(2)
    )
    if mean_key.numel() == 0:
        return mean_key, mean_value
    block_d, block_s = triton.next_power_of_2(head_dim), triton.next_power_of_2(block_size)
    with torch.cuda.device_of(key):
        pool_weighted_kernel[(batch * num_blocks * heads,)](
            key, value, direction.float().contiguous(), mean_key, mean_value, offsets.contiguous(),
            *key.stride(), *value.stride(), num_blocks, heads, num_blocks + 1 if offsets.ndim == 2 else 0,
            D=head_dim, BLOCK_D=block_d, BLOCK_S=block_s, ROWS=max(1, min(block_s, _TILE // block_d)),
            num_warps=_NUM_WARPS,
        )  # fmt: skip
    return mean_key, mean_value
