"""Antidiagonal estimates of the attention of block pairs, in Triton: a product over groups of tokens, then sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import contiguous_last, shared_memory

_LOG2_E = 1.4426950408889634
_CHUNK_SHARES = 2**26  # log-sum-exps of pairs of a group and a block, alive at once
_SWEEP = 8  # tiles of rows whose programs run side by side and share keys
_ANY_VALUE = ["query_length", "key_length", "front", "first_block", "start", "stop", "tiles_m", "num_columns"]


@triton.jit(do_not_specialize=_ANY_VALUE)
def antidiagonal_lse_kernel(
    p_q, p_k, p_out,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    scale_log2, query_length, key_length, front, first_block, start, stop, tiles_m, num_columns,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, PLACES: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS_N: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exps over the groups of a key block, for a tile of query groups and one of key blocks.

    A tile's columns are the groups of its blocks, ``PLACES`` (a power of two) of them to a block.
    """
    i_p = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    tiles_n = tl.num_programs(0) // tiles_m
    # columns of a few tiles of rows at a time: what runs side by side reads the same keys and queries
    sweep = SWEEP * tiles_n
    first_m = i_p // sweep * SWEEP
    height = tl.minimum(tiles_m - first_m, SWEEP)
    i_m = first_m + i_p % sweep % height
    i_n = i_p % sweep // height

    o_group = start + i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_group = o_group < stop
    # key groups up to a query group's own are seen
    b_position = o_group + first_block * PER_BLOCK
    last = tl.minimum(start + (i_m + 1) * BLOCK_M, stop) - 1 + first_block * PER_BLOCK
    if i_n * BLOCKS_N * PER_BLOCK > last:
        return
    o_n = tl.arange(0, BLOCKS_N * PLACES)
    o_place = o_n % PLACES
    o_key_group = (i_n * BLOCKS_N + o_n // PLACES) * PER_BLOCK + o_place
    m_key_group = o_place < PER_BLOCK

    o_d = tl.arange(0, BLOCK_D)
    o_query = o_group * STRIDE - front
    # a query's partner on the antidiagonal is the key from the other end
    o_key = o_key_group * STRIDE + (STRIDE - 1)
    p_rows = p_q + i_b * stride_qb + i_h * stride_qh + o_query.to(tl.int64)[:, None] * stride_qs + o_d[None, :]
    p_columns = p_k + i_b * stride_kb + i_h // GROUP * stride_kh + o_key.to(tl.int64)[None, :] * stride_ks
    p_columns += o_d[:, None]
    b_s = tl.zeros((BLOCK_M, BLOCKS_N * PLACES), dtype=tl.float32)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    for i_k in range(0, STRIDE * CHUNKS):
        i_s = i_k // CHUNKS
        first_d = i_k % CHUNKS * BLOCK_D
        m_d = first_d + o_d < D
        m_q = m_group & (o_query + i_s >= 0) & (o_query + i_s < query_length)
        m_k = m_key_group & (o_key - i_s < key_length)
        # [BLOCK_M, BLOCK_D] queries, [BLOCK_D, BLOCK_N] keys; tokens that are not there are zero
        b_q = tl.load(p_rows + i_s.to(tl.int64) * stride_qs + first_d, mask=m_q[:, None] & m_d[None, :], other=0.0)
        b_k = tl.load(p_columns - i_s.to(tl.int64) * stride_ks + first_d, mask=m_k[None, :] & m_d[:, None], other=0.0)
        b_s = tl.dot(b_q, b_k, b_s, input_precision="ieee")
    m_s = m_key_group[None, :] & (o_key_group[None, :] <= b_position[:, None])
    b_s = tl.where(m_s, b_s * scale_log2, float("-inf"))
    b_s = tl.reshape(b_s, (BLOCK_M, BLOCKS_N, PLACES))
    b_max = tl.max(b_s, 2)
    # blocks of which a row sees nothing keep a finite pivot, for -inf - -inf is NaN
    b_pivot = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.sum(tl.exp2(b_s - b_pivot[:, :, None]), 2)
    b_lse = tl.where(b_sum > 0.0, b_pivot + tl.log2(b_sum), float("-inf"))
    o_block = i_n * BLOCKS_N + tl.arange(0, BLOCKS_N)
    p_out += ((i_b * tl.num_programs(1) + i_h) * (stop - start) + (o_group - start)[:, None]) * num_columns
    tl.store(p_out + o_block[None, :], b_lse, mask=m_group[:, None] & (o_block < num_columns)[None, :])


@triton.jit(do_not_specialize=["num_groups", "num_rows", "first_row", "first_block", "first_real", "last_real"])
def antidiagonal_sums_kernel(
    p_lse, p_out,
    num_groups, num_rows, num_columns, first_row, first_block, first_real, last_real,
    PER_BLOCK: tl.constexpr, PLACES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of blocks per program: the softmax of each of its groups over the blocks, summed over the groups."""
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    o_r = tl.arange(0, PLACES)
    o_group = (first_row + i_q) * PER_BLOCK + o_r
    # groups without a query put their attention nowhere
    m_r = (o_r < PER_BLOCK) & (o_group >= first_real) & (o_group <= last_real)
    seen = tl.minimum(first_block + first_row + i_q + 1, num_columns)
    p_rows = p_lse + (i_bh * num_groups + i_q * PER_BLOCK + o_r[:, None]) * num_columns
    b_max = tl.full((PLACES,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((PLACES,), dtype=tl.float32)
    for o_start in range(0, seen, BLOCK_C):
        o_c = o_start + tl.arange(0, BLOCK_C)
        m_c = m_r[:, None] & (o_c < seen)[None, :]
        b_lse = tl.load(p_rows + o_c[None, :], mask=m_c, other=float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_lse, 1))
        b_pivot = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_sum = b_sum * tl.exp2(b_max - b_pivot) + tl.sum(tl.exp2(b_lse - b_pivot[:, None]), 1)
        b_max = b_new_max
    b_total = tl.where(b_sum > 0.0, b_max + tl.log2(b_sum), float("inf"))
    p_out += (i_bh * num_rows + first_row + i_q) * num_columns
    for o_start in range(0, num_columns, BLOCK_C):
        o_c = o_start + tl.arange(0, BLOCK_C)
        m_c = m_r[:, None] & (o_c < seen)[None, :]
        b_lse = tl.load(p_rows + o_c[None, :], mask=m_c, other=float("-inf"))
        tl.store(p_out + o_c, tl.sum(tl.exp2(b_lse - b_total[:, None]), 0), mask=o_c < num_columns)


class Tiling(NamedTuple):
    """Tile sizes and launch options of the product."""

    rows: int
    columns: int
    chunk: int  # of head_dim
    num_warps: int
    num_stages: int


def choose_tiling(dtype: torch.dtype, head_dim: int, places: int, shared_memory: int) -> Tiling:
    """The tiling for a dtype, head dimension and groups of a block on a GPU with ``shared_memory`` bytes per program.

    16 bits: 128 × 256 where it fits, else 128 × 128. fp32 runs on the ordinary cores, with small tiles.
    """
    chunk = min(64, max(16, triton.next_power_of_2(head_dim)))
    if dtype == torch.float32:
        return Tiling(32, max(32, places), min(chunk, 32), 4, 2)
    if shared_memory >= 160 * 1024:
        return Tiling(128, 256, chunk, 8, 4 if shared_memory >= 200 * 1024 else 3)
    return Tiling(128, 128, min(chunk, 32), 8, 3)


def antidiagonal_mass(query: Tensor, key: Tensor, block_size: int, stride: int, scale: float) -> Tensor:
    """See ``draftattn.kernels.antidiagonal_mass.antidiagonal_mass``."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys = key.shape[1]
    per_block = block_size // stride
    places = triton.next_power_of_2(per_block)
    first_block, front = divmod(num_keys - num_queries, block_size)
    rows, columns = triton.cdiv(front + num_queries, block_size), triton.cdiv(num_keys, block_size)
    out = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    query, key = contiguous_last(query), contiguous_last(key)
    tiling = choose_tiling(query.dtype, head_dim, places, shared_memory(query.device))
    blocks_n = tiling.columns // places
    at_once = max(1, _CHUNK_SHARES // (batch * heads * per_block * columns))
    per_tile = max(1, tiling.rows // per_block)
    if at_once > per_tile:
        at_once -= at_once % per_tile
    at_once = min(rows, at_once)
    width = max(16, min(4096 // places, triton.next_power_of_2(columns)))
    lse = torch.empty(batch * heads * at_once * per_block * columns, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        for first in range(0, rows, at_once):
            end = min(first + at_once, rows)
            num_groups = (end - first) * per_block
            tiles_m = triton.cdiv(num_groups, tiling.rows)
            tiles_n = triton.cdiv(min(first_block + end, columns), blocks_n)
            antidiagonal_lse_kernel[(tiles_m * tiles_n, heads, batch)](
                query, key, lse,
                *query.stride()[:3], *key.stride()[:3],
                scale / stride * _LOG2_E, num_queries, num_keys, front, first_block,
                first * per_block, end * per_block, tiles_m, columns,
                GROUP=heads // key.shape[2], STRIDE=stride, PER_BLOCK=per_block, PLACES=places,
                D=head_dim, BLOCK_D=tiling.chunk, BLOCK_M=tiling.rows, BLOCKS_N=blocks_n, SWEEP=_SWEEP,
                num_warps=tiling.num_warps, num_stages=tiling.num_stages,
            )  # fmt: skip
            antidiagonal_sums_kernel[(end - first, batch * heads)](
                lse, out,
                num_groups, rows, columns, first, first_block, front // stride, (front + num_queries - 1) // stride,
                PER_BLOCK=per_block, PLACES=places, BLOCK_C=width,
                num_warps=4,
            )  # fmt: skip
    return out
