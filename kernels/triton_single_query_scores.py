"""Scores of key blocks from the attention of one query to all compressed keys, in Triton."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import contiguous_last

_LOG2_E = 1.4426950408889634
_BLOCKS = 64  # that a program scores


@triton.jit(do_not_specialize=["count"])
def single_query_logits_kernel(
    p_q, p_k, p_logits, p_parts,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kh,
    scale_log2, count,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head per program: its scores with the query heads, and their log-sum-exp, in base 2.

    Writes ``p_logits`` ``[B, H, count]`` and ``p_parts`` ``[B, H, tiles]``.
    """
    i_n = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_g = tl.arange(0, ROWS)
    m_g = o_g < GROUP
    o_h = i_h * GROUP + o_g
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < count
    # [ROWS, BLOCK_D] queries
    p_rows = p_q + i_b * stride_qb + o_h[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_rows, mask=m_g[:, None] & m_d[None, :], other=0.0)
    # [BLOCK_D, BLOCK_N] keys
    p_tile = p_k + i_b * stride_kb + i_h * stride_kh + o_n.to(tl.int64)[None, :] * stride_ks + o_d[:, None]
    b_k = tl.load(p_tile, mask=m_n[None, :] & m_d[:, None], other=0.0)
    b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
    o_row = i_b * tl.num_programs(1) * GROUP + o_h
    tl.store(p_logits + o_row[:, None] * count + o_n[None, :], b_s, mask=m_g[:, None] & m_n[None, :])
    b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_max = tl.max(b_s, 1)
    b_lse = b_max + tl.log2(tl.sum(tl.exp2(b_s - b_max[:, None]), 1))
    tl.store(p_parts + o_row * tl.num_programs(0) + i_n, b_lse, mask=m_g)


@triton.jit(do_not_specialize=["count", "tiles", "num_blocks", "initial", "local"])
def single_query_maxima_kernel(
    p_logits, p_parts, p_out, count, tiles, num_blocks, initial, local,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, KEY_WIDTH: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Some blocks of one key head per program, which merges the log-sum-exps of the tiles for itself."""
    i_j = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_g = tl.arange(0, ROWS)
    m_g = o_g < GROUP
    i_row = i_b * tl.num_programs(1) + i_h
    o_row = i_row * GROUP + o_g
    b_max = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, tiles, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m_p = m_g[:, None] & (o_p < tiles)[None, :]
        b_part = tl.load(p_parts + o_row[:, None] * tiles + o_p[None, :], mask=m_p, other=float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_part, 1))
        # a row of no query keeps a finite pivot, for -inf - -inf is NaN
        b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_sum = b_sum * tl.exp2(b_max - b_pivot) + tl.sum(tl.exp2(b_part - b_pivot[:, None]), 1)
        b_max = b_new_max
    # such a row has probabilities of 0
    m_seen = b_sum > 0.0
    b_lse = tl.where(m_seen, b_max + tl.log2(tl.where(m_seen, b_sum, 1.0)), float("inf"))

    o_j = i_j * BLOCK_J + tl.arange(0, BLOCK_J)
    b_scores = tl.zeros((BLOCK_J,), dtype=tl.float32)
    for i_n in range(0, BLOCK_WIDTH + KEY_WIDTH - 1):
        o_c = o_j * BLOCK_WIDTH + (i_n - KEY_WIDTH + 1)
        m_c = (o_c >= 0) & (o_c < count)
        # [ROWS, BLOCK_J] scores of a compressed key that may touch each block
        p_tile = p_logits + o_row[:, None] * count + o_c[None, :]
        b_s = tl.load(p_tile, mask=m_g[:, None] & m_c[None, :], other=float("-inf"))
        b_scores = tl.maximum(b_scores, tl.sum(tl.exp2(b_s - b_lse[:, None]), 0))
    b_scores = tl.where((o_j < initial) | (o_j >= num_blocks - local), float("inf"), b_scores)
    tl.store(p_out + i_row * num_blocks + o_j, b_scores, mask=o_j < num_blocks)


@functools.lru_cache(maxsize=256)
def _powers_of_2(*numbers: int) -> tuple[int, ...]:
    # every decoding step asks for every layer, and Triton's function takes microseconds
    return tuple(triton.next_power_of_2(number) for number in numbers)


def single_query_block_scores(
    query: Tensor,
    key: Tensor,
    num_blocks: int,
    block_width: int,
    key_width: int,
    scale: float,
    initial: int,
    local: int,
) -> Tensor:
    """See ``draftattn.kernels.single_query_scores.single_query_block_scores``.

    A tile has 64 keys, so that the windows of 32,768 tokens under eight key heads are programs for all of an H100; in
    fp32, which runs on the ordinary cores, 32.
    """
    batch, _, heads, head_dim = query.shape
    count, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    out = torch.empty(batch, kv_heads, 1, num_blocks, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    query, key = contiguous_last(query), contiguous_last(key)
    columns = 32 if query.dtype == torch.float32 else 64
    tiles = -(-count // columns)
    group_rows, block_d = _powers_of_2(group, head_dim)
    logits = torch.empty(batch, heads, count, dtype=torch.float32, device=query.device)
    parts = torch.empty(batch, heads, tiles, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        if tiles:
            single_query_logits_kernel[(tiles, kv_heads, batch)](
                query, key, logits, parts,
                query.stride(0), query.stride(2), *key.stride()[:3],
                scale * _LOG2_E, count,
                GROUP=group, ROWS=max(16, group_rows), D=head_dim, BLOCK_D=block_d, BLOCK_N=columns,
                num_warps=4,
            )  # fmt: skip
        single_query_maxima_kernel[(-(-num_blocks // _BLOCKS), kv_heads, batch)](
            logits, parts, out, count, tiles, num_blocks, initial, local,
            GROUP=group, ROWS=group_rows, BLOCK_WIDTH=block_width, KEY_WIDTH=key_width, BLOCK_J=_BLOCKS,
            BLOCK_P=max(16, 256 // group_rows),
            num_warps=2,
        )  # fmt: skip
    return out
