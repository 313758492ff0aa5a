"""The log-sum-exp of every block of keys for a few queries, in Triton: one product, no values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import contiguous_last, item_stride, num_multiprocessors

_LOG2_E = 1.4426950408889634
_INTEGERS = ["stride_offsets_b", "num_queries", "num_blocks", "blocks_per_part", "parts"]


@triton.jit(do_not_specialize=_INTEGERS)
def block_lse_kernel(
    p_q, p_k, p_out, p_offsets,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_offsets_b,
    scale_log2, num_queries, num_blocks, blocks_per_part, parts,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head and one part of the blocks per program."""
    i_h = tl.program_id(1).to(tl.int64)
    i_b = (tl.program_id(2) // parts).to(tl.int64)
    i_part = tl.program_id(2) % parts
    p_offsets += i_b * stride_offsets_b
    p_k += i_b * stride_kb + (i_h // GROUP) * stride_kh
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_queries
    p_rows = p_q + i_b * stride_qb + i_h * stride_qh + o_m.to(tl.int64)[:, None] * stride_qs + o_d[None, :]
    # [BLOCK_M, BLOCK_D] queries
    b_q = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_out += ((i_b * tl.num_programs(1) + i_h) * num_queries + o_m) * num_blocks
    first = i_part * blocks_per_part
    for i_n in range(first, tl.minimum(first + blocks_per_part, num_blocks)):
        start = tl.load(p_offsets + i_n)
        end = tl.load(p_offsets + i_n + 1)
        b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for i_t in tl.static_range(TILES_N):
            o_key = start + i_t * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = o_key < end
            # [BLOCK_D, BLOCK_N] keys
            p_tile = p_k + o_key.to(tl.int64)[None, :] * stride_ks + o_d[:, None]
            b_k = tl.load(p_tile, mask=m_n[None, :] & m_d[:, None], other=0.0)
            b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
            # a block without tokens keeps a finite pivot, for -inf - -inf is NaN
            b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_sum = b_sum * tl.exp2(b_max - b_pivot) + tl.sum(tl.exp2(b_s - b_pivot[:, None]), 1)
            b_max = b_new_max
        tl.store(p_out + i_n, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=m_m)


def block_lse(query: Tensor, key: Tensor, offsets: Tensor, scale: float, block_size: int = 128) -> Tensor:
    """``draftattn.kernels.block_lse.block_lse`` for fp16, bf16 and fp32."""
    batch, num_queries, heads, head_dim = query.shape
    num_blocks = offsets.shape[-1] - 1
    out = torch.empty(batch, heads, num_queries, num_blocks, dtype=torch.float32, device=key.device)
    if out.numel() == 0:
        return out
    query, key, offsets = contiguous_last(query.to(key.dtype)), contiguous_last(key), contiguous_last(offsets)
    block_d = max(16, triton.next_power_of_2(head_dim))
    # fp32 runs on the ordinary cores, which take whole rows of both operands into registers
    rows, columns = (16, 32) if key.dtype == torch.float32 else (64, 128 if head_dim <= 128 else 64)
    columns = min(columns, max(16, triton.next_power_of_2(block_size)))
    tiles = triton.cdiv(num_queries, rows)
    parts = triton.cdiv(8 * num_multiprocessors(key.device), tiles * heads * batch)
    blocks_per_part = triton.cdiv(num_blocks, min(parts, num_blocks))
    parts = triton.cdiv(num_blocks, blocks_per_part)
    with torch.cuda.device_of(key):
        block_lse_kernel[(tiles, heads, batch * parts)](
            query, key, out, offsets,
            *query.stride()[:3], *key.stride()[:3], item_stride(offsets),
            scale * _LOG2_E, num_queries, num_blocks, blocks_per_part, parts,
            GROUP=heads // key.shape[2], D=head_dim, BLOCK_D=block_d,
            BLOCK_M=rows, BLOCK_N=columns, TILES_N=triton.cdiv(block_size, columns),
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out
