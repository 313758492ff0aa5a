"""Attention to sinks, merged with that to a window, in Triton: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import contiguous_last

_TILE = 2048  # numbers of a tile of queries


@triton.jit
def _cos_sin(b_turns):
    """Cosine and sine of float64 turns, to float32's precision: the library's care for huge angles costs registers."""
    b_quarter = tl.floor(b_turns * 4.0 + 0.5)
    # at most an eighth of a turn either way, where Taylor's polynomials are exact to 2e-9
    b_x = (b_turns - b_quarter * 0.25).to(tl.float32) * 6.283185307179586
    b_quarter = (b_quarter - 4.0 * tl.floor(b_quarter * 0.25)).to(tl.int32)
    b_xx = b_x * b_x
    b_sin = 1.0 - b_xx * (1 / 42) * (1.0 - b_xx * (1 / 72))
    b_sin = b_x * (1.0 - b_xx * (1 / 6) * (1.0 - b_xx * (1 / 20) * b_sin))
    b_cos = 1.0 - b_xx * (1 / 30) * (1.0 - b_xx * (1 / 56) * (1.0 - b_xx * (1 / 90)))
    b_cos = 1.0 - b_xx * 0.5 * (1.0 - b_xx * (1 / 12) * b_cos)
    b_odd = b_quarter % 2 == 1
    b_c, b_s = tl.where(b_odd, b_sin, b_cos), tl.where(b_odd, b_cos, b_sin)
    b_c = tl.where((b_quarter == 1) | (b_quarter == 2), -b_c, b_c)
    return b_c, tl.where(b_quarter >= 2, -b_s, b_s)


@triton.jit(do_not_specialize=["length", "num_keys", "sink", "window"])
def sink_merge_kernel(
    p_near, p_lse, p_q, p_k, p_v, p_first, p_position, p_frequency, p_out,
    stride_nb, stride_ns, stride_nh, stride_lb, stride_lh, stride_ls, stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    length, num_keys, sink, window, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries and the heads that share one key head per program; the sinks come one after the other."""
    # programs that run together read the heads of the same queries, which are neighbours in memory
    i_kh = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    o_m = tl.program_id(0) // KV_HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    i_b = tl.program_id(1).to(tl.int64)
    m_m = o_m < length
    o_d, o_half = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_HALF)
    m_d, m_half = o_d < D, o_half < HALF
    m_md, m_mh = m_m[:, None] & m_d[None, :], m_m[:, None] & m_half[None, :]
    start = tl.load(p_position + i_b)
    first = tl.load(p_first + i_b)
    p_k += i_b * stride_kb + i_kh * stride_kh
    p_v += i_b * stride_vb + i_kh * stride_vh
    # [BLOCK_M] sinks that each query sees
    b_count = tl.where(m_m, tl.minimum(tl.maximum(start + o_m - window, 0), sink), 0)
    count = tl.max(b_count, 0)
    b_back = tl.maximum(start + o_m - window - sink, 0) - tl.maximum(start - window - sink, 0)
    # [BLOCK_M, BLOCK_HALF] turns, of which float32 would lose the fraction
    b_frequency = tl.load(p_frequency + o_half, mask=m_half, other=0.0)
    # a bare literal would be float32
    b_frequency = b_frequency * tl.full((1,), 0.15915494309189535, tl.float64)
    b_cos, b_sin = _cos_sin(b_back.to(tl.float64)[:, None] * b_frequency[None, :])
    o_m = o_m.to(tl.int64)
    for i_g in range(GROUP):
        i_h = i_kh * GROUP + i_g
        p_rows = p_q + i_b * stride_qb + i_h * stride_qh + o_m[:, None] * stride_qs
        # [BLOCK_M, BLOCK_HALF] halves of the queries, turned back
        b_q1 = tl.load(p_rows + o_half[None, :], mask=m_mh, other=0.0).to(tl.float32) * scale
        b_q2 = tl.load(p_rows + HALF + o_half[None, :], mask=m_mh, other=0.0).to(tl.float32) * scale
        b_t1 = b_q1 * b_cos + b_q2 * b_sin
        b_t2 = b_q2 * b_cos - b_q1 * b_sin
        if BLOCK_REST > 0:
            o_rest = 2 * HALF + tl.arange(0, BLOCK_REST)
            m_rest = o_rest < D
            b_rest = tl.load(p_rows + o_rest[None, :], mask=m_m[:, None] & m_rest[None, :], other=0.0)
            b_rest = b_rest.to(tl.float32) * scale
        # [BLOCK_M] maxima and sums of the weights so far
        b_max = tl.load(p_lse + i_b * stride_lb + i_h * stride_lh + o_m * stride_ls, mask=m_m, other=0.0)
        b_max = b_max.to(tl.float32)
        b_sum = tl.full((BLOCK_M,), 1.0, tl.float32)
        # [BLOCK_M, BLOCK_D] weighted values so far
        p_rows = p_near + i_b * stride_nb + i_h * stride_nh + o_m[:, None] * stride_ns
        b_acc = tl.load(p_rows + o_d[None, :], mask=m_md, other=0.0).to(tl.float32)
        for i_s in range(count):
            i_row = tl.minimum(first + i_s, num_keys - 1).to(tl.int64)
            p_row = p_k + i_row * stride_ks
            b_k1 = tl.load(p_row + o_half, mask=m_half, other=0.0).to(tl.float32)
            b_k2 = tl.load(p_row + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)
            b_s = tl.sum(b_t1 * b_k1[None, :] + b_t2 * b_k2[None, :], 1)
            if BLOCK_REST > 0:
                b_k3 = tl.load(p_row + o_rest, mask=m_rest, other=0.0).to(tl.float32)
                b_s += tl.sum(b_rest * b_k3[None, :], 1)
            b_s = tl.where(i_s < b_count, b_s, float("-inf"))
            b_new_max = tl.maximum(b_max, b_s)
            b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_rescale = tl.exp(b_max - b_pivot)
            b_weight = tl.exp(b_s - b_pivot)
            b_v = tl.load(p_v + i_row * stride_vs + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_acc = b_acc * b_rescale[:, None] + b_weight[:, None] * b_v[None, :]
            b_sum = b_sum * b_rescale + b_weight
            b_max = b_new_max
        b_acc = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        p_rows = p_out + i_b * stride_ob + i_h * stride_oh + o_m[:, None] * stride_os
        tl.store(p_rows + o_d[None, :], b_acc.to(p_out.dtype.element_ty), mask=m_md)


def merge_sinks(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_sinks: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    sink: int,
    window: int,
    scale: float,
) -> Tensor:
    """``draftattn.kernels.sink_merge.merge_sinks`` for fp16, bf16 and fp32."""
    batch, length, heads, head_dim = query.shape
    merged = torch.empty(query.shape, dtype=output.dtype, device=query.device)
    if merged.numel() == 0:
        return merged
    near, query, key, value = (contiguous_last(x) for x in (output, query, key, value))
    half, kv_heads = len(frequencies), key.shape[2]
    rest = head_dim - 2 * half
    block_d, block_half, block_rest = (1 << (n - 1).bit_length() if n else 0 for n in (head_dim, half, rest))
    block_m = max(1, _TILE // block_d)
    with torch.cuda.device_of(query):
        sink_merge_kernel[(-(-length // block_m) * kv_heads, batch)](
            near, lse, query, key, value, first_sinks.contiguous(), positions.contiguous(),
            frequencies.contiguous(), merged,
            *near.stride()[:3], *lse.stride(), *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            *merged.stride()[:3], length, key.shape[1], sink, window, scale,
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, D=head_dim, BLOCK_D=block_d,
            HALF=half, BLOCK_HALF=block_half, BLOCK_REST=block_rest, BLOCK_M=block_m, num_warps=4,
        )  # fmt: skip
    return merged
