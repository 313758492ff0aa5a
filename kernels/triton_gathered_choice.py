"""The gate of MoBA in Triton: scores of a tile of queries stay in registers, where the best are taken one by one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.triton_launch import contiguous_last, shared_memory

# parts that a float32 mean is split into, and what the rest is multiplied with so that it does not become denormal
_PARTS = {torch.bfloat16: (3, 1.0), torch.float16: (2, 2048.0), torch.float32: (1, 1.0)}
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of a chunk that may be chosen
_NONE = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["kv_heads", "num_chunks", "chunk_size"])
def chunk_means_kernel(
    p_k, p_means, stride_kb, stride_ks, stride_kh, stride_part, kv_heads, num_chunks, chunk_size,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The mean of a chunk of keys per program, in parts: their sum, each divided by STEP once more, is the mean."""
    i_c = tl.program_id(0).to(tl.int64)
    i_u = tl.program_id(1).to(tl.int64)
    p_k += (i_u // kv_heads) * stride_kb + (i_u % kv_heads) * stride_kh + i_c * chunk_size * stride_ks
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # [BLOCK_N, BLOCK_D] sums of every BLOCK_N-th key
    b_sum = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first in range(0, chunk_size, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        p_tile = p_k + o_n.to(tl.int64)[:, None] * stride_ks + o_d[None, :]
        b_sum += tl.load(p_tile, mask=(o_n < chunk_size)[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_rest = tl.sum(b_sum, 0) / chunk_size
    for i in tl.static_range(PARTS):
        b_part = b_rest.to(p_means.dtype.element_ty)
        tl.store(p_means + i * stride_part + (i_u * num_chunks + i_c) * D + o_d, b_part, mask=m_d)
        b_rest = (b_rest - b_part.to(tl.float32)) * STEP


@triton.jit
def _gate(
    b_q, b_own, o_c, p_means, stride_part, num_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, FORCE_FIRST: tl.constexpr,
):  # fmt: skip
    """Scores ``[BLOCK_R, BLOCK_C]``: finite or infinity for chunks before a query's own, -infinity for all others."""
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_D, BLOCK_C] means
    m_tile = (o_c < num_chunks)[None, :] & (o_d < D)[:, None]
    p_tile = p_means + o_c[None, :].to(tl.int64) * D + o_d[:, None]
    b_s = tl.zeros((b_q.shape[0], o_c.shape[0]), dtype=tl.float32)
    for i in tl.static_range(PARTS):  # the smallest part first
        b_m = tl.load(p_tile + (PARTS - 1 - i) * stride_part, mask=m_tile, other=0.0)
        b_s = tl.dot(b_q, b_m, b_s * (1.0 / STEP), input_precision="ieee")
    b_s = tl.where(b_s != b_s, float("inf"), tl.maximum(b_s, _LOWEST))
    if FORCE_FIRST:
        b_s = tl.where(o_c[None, :] == 0, float("inf"), b_s)
    return tl.where(o_c[None, :] < b_own[:, None], b_s, float("-inf"))


@triton.jit
def _best(b_s, o_c):
    """The largest score of every row and its chunk, the lowest of equals, and the scores without it."""
    b_max = tl.max(b_s, 1)
    b_c = tl.min(tl.where(b_s == b_max[:, None], o_c[None, :], _NONE), 1)
    return b_max, b_c, tl.where(o_c[None, :] == b_c[:, None], float("-inf"), b_s)


@triton.jit
def _count_bits(b_x):
    """How many bits of int32 numbers are set."""
    b_x = b_x - ((b_x >> 1) & 0x55555555)
    b_x = (b_x & 0x33333333) + ((b_x >> 2) & 0x33333333)
    b_x = (b_x + (b_x >> 4)) & 0x0F0F0F0F
    return ((b_x * 0x01010101) >> 24) & 0xFF


@triton.jit
def _write_members(
    m_chose, i_t, o_c, p_members, p_counts, num_chunks, num_tiles, BLOCK_R: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Writes which rows of each tile chose the chunks ``o_c``, a bit for a row, and how many they are."""
    o_bit = tl.arange(0, BLOCK_R) % TILE
    b_bits = tl.where(m_chose, 1 << o_bit[:, None], 0).reshape(BLOCK_R // TILE, TILE, o_c.shape[0])
    b_members = tl.sum(b_bits, 1)
    o_tile = i_t * (BLOCK_R // TILE) + tl.arange(0, BLOCK_R // TILE)
    m_out = (o_tile < num_tiles)[:, None] & (o_c < num_chunks)[None, :]
    o_out = o_c[None, :].to(tl.int64) * num_tiles + o_tile[:, None]
    tl.store(p_members + o_out, b_members, mask=m_out)
    tl.store(p_counts + o_out, _count_bits(b_members), mask=m_out)


@triton.jit(do_not_specialize=["kv_heads", "num_rows", "num_chunks", "num_tiles", "first_position", "chunk_size"])
def choose_chunks_kernel(
    p_q, p_means, p_choice, p_members, p_counts, stride_qb, stride_qn, stride_qh, stride_part,
    kv_heads, num_rows, num_chunks, num_tiles, first_position, chunk_size,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SINGLE: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr, STEP: tl.constexpr, FORCE_FIRST: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of a key head per program; a row is a query and a head, a query's heads side by side.

    Members and counts are ``[U, C, tiles]``, counts behind one zero: their running sums are where each tile begins.
    """
    i_t = tl.program_id(0)
    i_u = tl.program_id(1).to(tl.int64)
    o_r = i_t * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_rows
    o_n = o_r // GROUP
    o_h = (i_u % kv_heads) * GROUP + o_r % GROUP
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_q + (i_u // kv_heads) * stride_qb + o_n.to(tl.int64) * stride_qn + o_h * stride_qh
    b_q = tl.load(p_rows[:, None] + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
    # rows past the end choose nothing
    b_own = tl.where(m_r, (first_position + o_n) // chunk_size, 0)
    p_means += i_u * num_chunks * D
    p_choice += i_u * SLOTS * num_rows + o_r
    if i_t + i_u == 0:
        tl.store(p_counts, 0)
    p_members += i_u * num_chunks * num_tiles
    p_counts += 1 + i_u * num_chunks * num_tiles
    if SINGLE:
        o_c = tl.arange(0, BLOCK_C)
        b_s = _gate(b_q, b_own, o_c, p_means, stride_part, num_chunks, D, BLOCK_D, PARTS, STEP, FORCE_FIRST)
        for _ in range(SLOTS):
            _, b_c, b_s = _best(b_s, o_c)
            tl.store(p_choice, b_c, mask=m_r)
            p_choice += num_rows
        m_chose = (o_c[None, :] < b_own[:, None]) & (b_s == float("-inf"))
        _write_members(m_chose, i_t, o_c, p_members, p_counts, num_chunks, num_tiles, BLOCK_R, TILE)
    else:
        o_s = tl.arange(0, BLOCK_S)
        # [BLOCK_R, BLOCK_S] the best so far; places past SLOTS are never the worst
        b_value = tl.where((o_s < SLOTS)[None, :], float("-inf"), float("inf"))
        b_value = tl.broadcast_to(b_value, (BLOCK_R, BLOCK_S))
        b_id = tl.broadcast_to((num_chunks + o_s)[None, :], (BLOCK_R, BLOCK_S))
        for first in range(0, tl.minimum(tl.max(b_own, 0), num_chunks), BLOCK_C):
            o_c = first + tl.arange(0, BLOCK_C)
            b_s = _gate(b_q, b_own, o_c, p_means, stride_part, num_chunks, D, BLOCK_D, PARTS, STEP, FORCE_FIRST)
            b_max, b_c, b_s = _best(b_s, o_c)
            b_worst = tl.min(b_value, 1)
            # chunks ascend, so an equal score does not replace one that is there
            while tl.max((b_max > b_worst).to(tl.int32), 0) > 0:
                m_worst = b_value == b_worst[:, None]
                b_out = tl.max(tl.where(m_worst, b_id, -1), 1)
                m_out = m_worst & (b_id == b_out[:, None]) & (b_max > b_worst)[:, None]
                b_value = tl.where(m_out, b_max[:, None], b_value)
                b_id = tl.where(m_out, b_c[:, None], b_id)
                b_max, b_c, b_s = _best(b_s, o_c)
                b_worst = tl.min(b_value, 1)
        b_id = tl.where(m_r[:, None] & (o_s < SLOTS)[None, :], b_id, -1)
        tl.store(p_choice[:, None] + o_s[None, :].to(tl.int64) * num_rows, b_id, mask=b_id >= 0)
        for first in range(0, num_chunks, BLOCK_C):
            o_c = first + tl.arange(0, BLOCK_C)
            b_chose = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.int32)
            for i_s in range(SLOTS):
                b_c = tl.max(tl.where((o_s == i_s)[None, :], b_id, -1), 1)
                b_chose = tl.where(o_c[None, :] == b_c[:, None], 1, b_chose)
            _write_members(b_chose > 0, i_t, o_c, p_members, p_counts, num_chunks, num_tiles, BLOCK_R, TILE)


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "num_tiles"])
def place_kernel(
    p_choice, p_members, p_starts, num_rows, num_chunks, num_tiles,
    SLOTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts places in the stead of chunks: where those of the chunk and tile begin, and how many rows are before."""
    i_u = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < num_rows
    p_choice += i_u * SLOTS * num_rows + o_r
    p_members += i_u * num_chunks * num_tiles + o_r // TILE
    p_starts += i_u * num_chunks * num_tiles + o_r // TILE
    b_above = (1 << (o_r % TILE)) - 1
    # a few tiles with all their slots, so that most of what they look up is in the cache
    for _ in range(SLOTS):
        o_c = tl.load(p_choice, mask=m_r, other=0).to(tl.int64) * num_tiles
        b_rank = _count_bits(tl.load(p_members + o_c, mask=m_r, other=0) & b_above)
        tl.store(p_choice, tl.load(p_starts + o_c, mask=m_r, other=0) + b_rank, mask=m_r)
        p_choice += num_rows


class Tile(NamedTuple):
    """Rows and chunks that a program scores at once, and its warps."""

    rows: int
    columns: int
    num_warps: int


def choose_tile(dtype: torch.dtype, head_dim: int, num_chunks: int) -> Tile:
    """The tile for a dtype and head dimension; 64 scores a thread, and operands that fit 99 KB of shared memory.

    >>> choose_tile(torch.bfloat16, 128, 127)
    Tile(rows=128, columns=128, num_warps=8)
    """
    if dtype == torch.float32:
        # the ordinary cores take whole rows of both operands into registers
        tile = Tile(32, 32, 4) if head_dim <= 128 else Tile(16, 16, 4)
    else:
        tile = Tile(128, 128, 8) if head_dim <= 128 else Tile(64, 64, 4)
    return tile._replace(columns=min(tile.columns, max(16, triton.next_power_of_2(num_chunks))))


def choose_chunks(
    query: Tensor, key: Tensor, first_position: int, chunk_size: int, num_chosen: int, force_first: bool
) -> tuple[Tensor, Tensor]:
    """See ``draftattn.kernels.gathered_choice.choose_chunks``; fp16, bf16 and fp32."""
    batch, length, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    units, group, num_chunks = batch * kv_heads, heads // kv_heads, (num_keys - 1) // chunk_size
    num_rows = length * group
    place = torch.empty(batch, kv_heads, num_chosen, length, group, dtype=torch.int32, device=query.device)
    if place.numel() == 0:
        return place, torch.zeros(units * num_chunks + 1, dtype=torch.int32, device=query.device)
    query, key = contiguous_last(query), contiguous_last(key)
    parts, step = _PARTS[key.dtype]
    means = torch.empty(parts, units, num_chunks, head_dim, dtype=key.dtype, device=key.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile = choose_tile(query.dtype, head_dim, num_chunks)
    single, bits = num_chunks <= tile.columns, min(32, tile.rows)
    # where the matrix units read shared memory, so that two programs fit a multiprocessor
    limits = dict(maxnreg=128) if single and tile.rows == 128 and shared_memory(query.device) >= 200 * 1024 else {}
    num_tiles = triton.cdiv(num_rows, bits)
    members = torch.empty(units * num_chunks * num_tiles, dtype=torch.int32, device=query.device)
    counts = torch.empty(len(members) + 1, dtype=torch.int32, device=query.device)
    with torch.cuda.device_of(query):
        chunk_means_kernel[(num_chunks, units)](
            key, means, *key.stride()[:3], means.stride(0), kv_heads, num_chunks, chunk_size,
            D=head_dim, BLOCK_D=block_d, BLOCK_N=max(1, 8192 // block_d), PARTS=parts, STEP=step, num_warps=4,
        )  # fmt: skip
        choose_chunks_kernel[(triton.cdiv(num_rows, tile.rows), units)](
            query, means, place, members, counts, *query.stride()[:3], means.stride(0),
            kv_heads, num_rows, num_chunks, num_tiles, first_position, chunk_size,
            GROUP=group, D=head_dim, BLOCK_D=block_d, SLOTS=num_chosen, BLOCK_S=triton.next_power_of_2(num_chosen),
            BLOCK_R=tile.rows, BLOCK_C=tile.columns, SINGLE=single, TILE=bits,
            PARTS=parts, STEP=step, FORCE_FIRST=force_first, num_warps=tile.num_warps, **limits,
        )  # fmt: skip
        starts = counts.cumsum(0, dtype=torch.int32)
        place_kernel[(triton.cdiv(num_rows, 256), units)](
            place, members, starts, num_rows, num_chunks, num_tiles,
            SLOTS=num_chosen, TILE=bits, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return place, starts[::num_tiles]
