"""The log-sum-exp of queries over the compressed keys that they see, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import contiguous_last

_LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["length", "count"])
def compressed_lse_kernel(
    p_q, p_k, p_visible, p_out,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    scale_log2, length, count,
    GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one key head per program; rows are (token, query head of the group) pairs."""
    # the last tokens see most: they begin first
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * GROUP

    o_r = tl.arange(0, BLOCK_T * GROUP_ROWS)
    o_m = i_t * BLOCK_T + o_r // GROUP_ROWS
    o_g = o_r % GROUP_ROWS
    m_m = (o_m < length) & (o_g < GROUP)
    o_h = i_h * GROUP + o_g
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_rows = p_q + i_b * stride_qb + o_m.to(tl.int64)[:, None] * stride_qs + o_h[:, None] * stride_qh + o_d[None, :]
    # [rows, BLOCK_D] queries
    b_q = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_visible = tl.minimum(tl.load(p_visible + o_m, mask=m_m, other=0), count)
    most = tl.max(b_visible, 0)
    p_k += i_b * stride_kb + i_h * stride_kh
    b_max = tl.full((BLOCK_T * GROUP_ROWS,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_T * GROUP_ROWS,), dtype=tl.float32)
    for start in range(0, most, BLOCK_N):
        o_c = start + tl.arange(0, BLOCK_N)
        p_tile = p_k + o_c.to(tl.int64)[None, :] * stride_ks + o_d[:, None]
        # [BLOCK_D, BLOCK_N] keys
        b_k = tl.load(p_tile, mask=(o_c < most)[None, :] & m_d[:, None], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
        b_s = tl.where(o_c[None, :] < b_visible[:, None], b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        # a row that has seen nothing keeps a finite pivot, for -inf - -inf is NaN
        b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_sum = b_sum * tl.exp2(b_max - b_pivot) + tl.sum(tl.exp2(b_s - b_pivot[:, None]), 1)
        b_max = b_new_max
    b_lse = tl.where(b_sum > 0.0, (b_max + tl.log2(b_sum)) * 0.6931471805599453, float("-inf"))
    tl.store(p_out + (i_b * heads + o_h) * length + o_m, b_lse, mask=m_m)


def compressed_lse(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """See ``draftattn.kernels.compressed_lse.compressed_lse``.

    A tile has 128 rows, queries of a key head's group side by side, and 128 keys, so that two programs share a
    multiprocessor; fp32, which runs on the ordinary cores, has 32 rows and 32 keys.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    out = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    query, key = contiguous_last(query), contiguous_last(key)
    group_rows = triton.next_power_of_2(heads // kv_heads)
    rows, columns = (32, 32) if query.dtype == torch.float32 else (128, 128 if head_dim <= 128 else 64)
    tokens = max(1, rows // group_rows)
    with torch.cuda.device_of(query):
        compressed_lse_kernel[(triton.cdiv(length, tokens), kv_heads, batch)](
            query, key, visible.contiguous(), out,
            *query.stride()[:3], *key.stride()[:3],
            scale * _LOG2_E, length, key.shape[1],
            GROUP=heads // kv_heads, GROUP_ROWS=group_rows, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_T=tokens, BLOCK_N=columns,
            num_warps=8 if rows == 128 else 4, num_stages=2,
        )  # fmt: skip
    return out
