"""Scores of key blocks from attention over compressed keys, in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import num_multiprocessors

if TYPE_CHECKING:
    from draftattn.kernels.compressed_scores import AlwaysChosen

_LOG2_E = 1.4426950408889634


@triton.jit
def _store_scores(
    p_out, b_scores, o_t, o_j, b_own, length, num_blocks, initial, local, stride_ot, ALWAYS: tl.constexpr
):
    """Writes a tile [BLOCK_T, BLOCK_J], with infinities where a block is always or never chosen."""
    if ALWAYS:
        m_always = (o_j[None, :] < initial) | (o_j[None, :] > b_own[:, None] - local)
        b_scores = tl.where(m_always, float("inf"), b_scores)
        b_scores = tl.where(o_j[None, :] > b_own[:, None], float("-inf"), b_scores)
    m_out = (o_t < length)[:, None] & (o_j < num_blocks)[None, :]
    tl.store(p_out + o_t.to(tl.int64)[:, None] * stride_ot + o_j[None, :], b_scores, mask=m_out)


@triton.jit
def compressed_scores_kernel(
    p_q, p_k, p_lse, p_visible, p_own, p_out,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_lb, stride_lh, stride_ls,
    scale_log2, length, count, num_blocks, initial, local, splits,
    GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_WIDTH: tl.constexpr, KEY_WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr, MAXIMUM: tl.constexpr, ALWAYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one key head per program; rows are (token, query head of the group) pairs.

    Columns are blocks, which few tokens share out among several programs. Each of the compressed keys that may touch a
    block is a product of its own, so that all that concerns a block falls into one column.
    """
    # the last tokens see most: they begin first
    i_t = (tl.num_programs(0) - 1 - tl.program_id(0)) // splits
    i_s = tl.program_id(0) % splits
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)

    o_r = tl.arange(0, BLOCK_T * GROUP_ROWS)
    o_m = i_t * BLOCK_T + o_r // GROUP_ROWS
    o_g = o_r % GROUP_ROWS
    m_m = (o_m < length) & (o_g < GROUP)
    o_h = i_h * GROUP + o_g
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_q + i_b * stride_qb + o_m.to(tl.int64)[:, None] * stride_qs + o_h[:, None] * stride_qh + o_d[None, :]
    # [rows, BLOCK_D] queries
    b_q = tl.load(p_rows, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    p_lse += i_b * stride_lb + o_h * stride_lh + o_m.to(tl.int64) * stride_ls
    b_lse = tl.load(p_lse, mask=m_m, other=float("-inf"))
    # rows that see nothing, and those of no query, have probabilities of 0; in base 2
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * 1.4426950408889634)
    b_visible = tl.load(p_visible + o_m, mask=m_m, other=0)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    b_own = tl.zeros((BLOCK_T,), dtype=tl.int32)
    if ALWAYS:
        b_own = tl.load(p_own + o_t, mask=o_t < length, other=0)

    p_k += i_b * stride_kb + i_h * stride_kh
    stride_ot = num_blocks
    p_out += (i_b * heads + i_h) * length * stride_ot
    most = tl.max(b_visible, 0)
    touched = (most + KEY_WIDTH - 1 + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    # the program's own blocks are first to last; those from end on are touched by nothing that its tokens see
    share = tl.cdiv(tl.cdiv(num_blocks, BLOCK_J), splits) * BLOCK_J
    first, last = i_s * share, tl.minimum((i_s + 1) * share, num_blocks)
    end = tl.minimum(tl.cdiv(touched, BLOCK_J) * BLOCK_J, last)
    for o_start in tl.range(first, end, BLOCK_J, num_stages=STAGES):
        o_j = o_start + tl.arange(0, BLOCK_J)
        b_scores = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
        b_sum = tl.zeros((BLOCK_T * GROUP_ROWS, BLOCK_J), dtype=tl.float32)
        for i_n in tl.range(0, BLOCK_WIDTH + KEY_WIDTH - 1, num_stages=STAGES):
            o_c = o_j * BLOCK_WIDTH + (i_n - KEY_WIDTH + 1)
            m_c = (o_c >= 0) & (o_c < count)
            p_tile = p_k + o_c.to(tl.int64)[None, :] * stride_ks + o_d[:, None]
            # [BLOCK_D, BLOCK_J] keys
            b_k = tl.load(p_tile, mask=m_c[None, :] & (o_d < D)[:, None], other=0.0)
            b_p = tl.exp2(tl.dot(b_q, b_k, input_precision="ieee") * scale_log2 - b_lse[:, None])
            b_p = tl.where(m_c[None, :] & (o_c[None, :] < b_visible[:, None]), b_p, 0.0)
            if MAXIMUM:
                b_group = tl.sum(tl.reshape(b_p, (BLOCK_T, GROUP_ROWS, BLOCK_J)), 1)
                b_scores = tl.maximum(b_scores, b_group)
            else:
                # strides that the two share
                overlap = tl.minimum(tl.minimum(i_n + 1, BLOCK_WIDTH + KEY_WIDTH - 1 - i_n), OVERLAP)
                b_sum += b_p * overlap
        if not MAXIMUM:
            b_scores = tl.sum(tl.reshape(b_sum, (BLOCK_T, GROUP_ROWS, BLOCK_J)), 1)
        _store_scores(p_out, b_scores, o_t, o_j, b_own, length, num_blocks, initial, local, stride_ot, ALWAYS)
    for o_start in range(tl.maximum(first, end), last, BLOCK_J):
        o_j = o_start + tl.arange(0, BLOCK_J)
        b_scores = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
        _store_scores(p_out, b_scores, o_t, o_j, b_own, length, num_blocks, initial, local, stride_ot, ALWAYS)


def compressed_block_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    visible: Tensor,
    num_blocks: int,
    block_width: int,
    key_width: int,
    scale: float,
    maximum: bool,
    always: AlwaysChosen | None = None,
) -> Tensor:
    """See ``draftattn.kernels.compressed_scores.compressed_block_scores``.

    A tile has 128 rows, queries of a key head's group side by side, and 64 blocks; fp32, which runs on the ordinary
    cores, has 32 rows and 16 blocks. Where that leaves a GPU idle, the blocks of a tile of queries are shared out.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    out = torch.empty(batch, kv_heads, length, num_blocks, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    group_rows = triton.next_power_of_2(heads // kv_heads)
    # wide heads keep two tiles of keys on their way
    rows, columns, stages = (32, 16, 2) if query.dtype == torch.float32 else (128, 64, 3 if head_dim <= 128 else 2)
    tokens = max(1, rows // group_rows)
    visible, own = visible.contiguous(), visible if always is None else always.own.contiguous()
    programs = triton.cdiv(length, tokens) * kv_heads * batch
    splits = max(1, min(2 * num_multiprocessors(query.device) // programs, triton.cdiv(num_blocks, columns)))
    with torch.cuda.device_of(query):
        compressed_scores_kernel[(triton.cdiv(length, tokens) * splits, kv_heads, batch)](
            query, key, lse, visible, own, out,
            *query.stride()[:3], *key.stride()[:3], *lse.stride(),
            scale * _LOG2_E, length, key.shape[1], num_blocks,
            0 if always is None else always.initial, 0 if always is None else always.local, splits,
            GROUP=heads // kv_heads, GROUP_ROWS=group_rows, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_T=tokens, BLOCK_J=columns, BLOCK_WIDTH=block_width, KEY_WIDTH=key_width,
            OVERLAP=min(block_width, key_width), MAXIMUM=maximum, ALWAYS=always is not None, STAGES=stages,
            num_warps=8 if rows == 128 else 4, num_stages=stages,
        )  # fmt: skip
    return out
