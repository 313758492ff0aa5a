"""The log-sum-exp of every block of keys in two parts, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import contiguous_last, num_multiprocessors

_LOG2_E = 1.4426950408889634
_ANY_VALUE = ["num_queries", "num_keys", "num_blocks", "block_size", "blocks_per_part", "parts"]


@triton.jit(do_not_specialize=_ANY_VALUE)
def split_block_lse_kernel(
    p_q, p_k, p_out,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    scale_log2, num_queries, num_keys, num_blocks, block_size, blocks_per_part, parts,
    GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, TILES_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one key head and one part of the blocks per program.

    Rows are (token, query head of the group) pairs.
    """
    i_t = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = (tl.program_id(2) // parts).to(tl.int64)
    i_part = tl.program_id(2) % parts
    heads = tl.num_programs(1) * GROUP

    o_r = tl.arange(0, BLOCK_T * GROUP_ROWS)
    o_m = i_t * BLOCK_T + o_r // GROUP_ROWS
    o_g = o_r % GROUP_ROWS
    m_m = (o_m < num_queries) & (o_g < GROUP)
    o_h = i_h * GROUP + o_g
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_rows = p_q + i_b * stride_qb + o_m.to(tl.int64)[:, None] * stride_qs + o_h[:, None] * stride_qh + o_d[None, :]
    # [rows, BLOCK_D] queries
    b_q = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_position = o_m + num_keys - num_queries
    b_place = b_position % block_size
    p_k += i_b * stride_kb + i_h * stride_kh
    p_out += ((i_b * heads + o_h) * num_queries + o_m) * 2 * num_blocks
    first = i_part * blocks_per_part
    for i_n in range(first, tl.minimum(first + blocks_per_part, num_blocks)):
        b_max = tl.full((BLOCK_T * GROUP_ROWS,), float("-inf"), dtype=tl.float32)
        b_until = tl.zeros((BLOCK_T * GROUP_ROWS,), dtype=tl.float32)
        b_behind = tl.zeros((BLOCK_T * GROUP_ROWS,), dtype=tl.float32)
        for i_tile in tl.static_range(TILES_N):
            o_place = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            o_key = i_n * block_size + o_place
            m_n = (o_place < block_size) & (o_key < num_keys)
            p_tile = p_k + o_key.to(tl.int64)[None, :] * stride_ks + o_d[:, None]
            # [BLOCK_D, BLOCK_N] keys
            b_k = tl.load(p_tile, mask=m_n[None, :] & m_d[:, None], other=0.0)
            b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
            b_s = tl.where(m_n[None, :] & (o_key[None, :] <= b_position[:, None]), b_s, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
            # a block without visible keys keeps a finite pivot, for -inf - -inf is NaN
            b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_e = tl.exp2(b_s - b_pivot[:, None])
            m_until = o_place[None, :] <= b_place[:, None]
            b_factor = tl.exp2(b_max - b_pivot)
            b_until = b_until * b_factor + tl.sum(tl.where(m_until, b_e, 0.0), 1)
            b_behind = b_behind * b_factor + tl.sum(tl.where(m_until, 0.0, b_e), 1)
            b_max = b_new_max
        # the parts share a pivot: one so much smaller that it vanishes beside the other is nothing beside all blocks
        b_lse = tl.where(b_until > 0.0, (b_max + tl.log2(b_until)) * 0.6931471805599453, float("-inf"))
        tl.store(p_out + i_n, b_lse, mask=m_m)
        b_lse = tl.where(b_behind > 0.0, (b_max + tl.log2(b_behind)) * 0.6931471805599453, float("-inf"))
        tl.store(p_out + num_blocks + i_n, b_lse, mask=m_m)


def split_block_lse(query: Tensor, key: Tensor, block_size: int, scale: float) -> Tensor:
    """See ``draftattn.kernels.split_block_lse.split_block_lse``.

    A tile has 128 rows and a block's keys; fp32, which runs on the ordinary cores, has 16 rows and 32 keys.
    """
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    num_blocks = triton.cdiv(num_keys, block_size)
    out = torch.empty(batch, heads, num_queries, 2, num_blocks, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    query, key = contiguous_last(query), contiguous_last(key)
    group_rows = triton.next_power_of_2(heads // kv_heads)
    rows, columns = (16, 32) if query.dtype == torch.float32 else (128, 128 if head_dim <= 128 else 64)
    columns = min(columns, max(16, triton.next_power_of_2(block_size)))
    tokens = max(1, rows // group_rows)
    tiles = triton.cdiv(num_queries, tokens)
    parts = triton.cdiv(8 * num_multiprocessors(query.device), tiles * kv_heads * batch)
    blocks_per_part = triton.cdiv(num_blocks, min(parts, num_blocks))
    parts = triton.cdiv(num_blocks, blocks_per_part)
    with torch.cuda.device_of(query):
        split_block_lse_kernel[(tiles, kv_heads, batch * parts)](
            query, key, out,
            *query.stride()[:3], *key.stride()[:3],
            scale * _LOG2_E, num_queries, num_keys, num_blocks, block_size, blocks_per_part, parts,
            GROUP=heads // kv_heads, GROUP_ROWS=group_rows, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_T=tokens, BLOCK_N=columns, TILES_N=triton.cdiv(block_size, columns),
            # two tiles of wide heads are too much for GPUs of 99 KB
            num_warps=8 if rows == 128 else 4, num_stages=2 if head_dim <= 128 else 1,
        )  # fmt: skip
    return out
