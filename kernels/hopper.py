"""Block-sparse attention for Hopper GPUs (sm_90) in Gluon, warp-specialised, forward only.

A program stays on its multiprocessor and takes rows of blocks, 128 queries each, until none are left. One warp picks
them, and feeds through TMA a ring of stages: a stage holds a tile of keys and the values of the tile before. Two
warpgroups of 64 rows each multiply the next keys while they take the softmax, then add up the values; a row's first
scores overlap with the last values of the row before, so that the tensor cores do not drain between rows. Queries stay
in shared memory, two rows of blocks of them, which leaves registers for the rest.

A tile takes 2048 cycles of the tensor cores with head_dim 128, and 64 KB that every multiprocessor reads for itself:
for sparse patterns that traffic with L2 is likely the bound, for dense ones the power limit. Tiles of ragged blocks and
of means add a bias to the scores, 64 additions a thread more.

Gluon is experimental and differs between Triton versions: every use of it is in this module.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

if TYPE_CHECKING:
    from draftattn.kernels.api import BlockMeans
    from draftattn.kernels.block_mask import BlockMask

_LOG2_E = 1.4426950408889634

# renamed between Triton 3.6 and 3.9
_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_sync_threads = getattr(gl, "barrier", None) or gl.thread_barrier

_HALF = gl.constexpr(64)  # query rows of a consumer
_ROWS = gl.constexpr(128)  # query rows of a program
_COLUMNS = gl.constexpr(128)  # keys, or means, of a tile

# what the consumers do with a tile
_MASKED = gl.constexpr(1)  # add its bias to the scores, and compare rows with what sees each column
_NEW_ROW = gl.constexpr(2)  # finish the row of blocks before, and begin another
_END = gl.constexpr(4)  # there is no other: it only pushes the last row out


@gluon.jit
def _exp2(x):
    # Triton's own exp2 keeps denormals, at three more instructions per element
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _write(s_slot, x):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    s_slot.store(gl.full([1], x, gl.int32, layout=layout))


@gluon.jit
def _read(s_slot):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(s_slot.load(layout), 0)


@gluon.jit
def _find_row(i_t, num_rows, first, last, lists, shape, CAUSAL: gl.constexpr):
    """Where row ``i_t`` of blocks is: item, head, first query, queries, shift, place in the mask, count and two ids.

    After the rows of blocks come the query tokens before the first block and after the last, up to 128 at a time: they
    attend to nothing. After those, the end: no queries at all.
    """
    p_counts, p_ids, p_query_offsets, p_shifts, stride_row_b, heads_per_mask, stride_shifts_b, capacity = lists
    batch, heads, query_length, key_length, num_query_blocks = shape
    o_row = gl.to_tensor(0).to(gl.int64)
    shift = key_length - query_length
    if i_t < num_rows:
        i_q = i_t % num_query_blocks
        i_bh = i_t // num_query_blocks
        i_b = i_bh // heads
        i_h = i_bh % heads
        if CAUSAL:
            i_q = num_query_blocks - 1 - i_q  # the longest rows first
            if stride_shifts_b >= 0:
                shift = gl.load(p_shifts + i_b * stride_shifts_b + i_q)
        start = gl.load(p_query_offsets + i_q)
        rows = gl.load(p_query_offsets + i_q + 1) - start
        o_row = i_b.to(gl.int64) * stride_row_b + (i_h // heads_per_mask) * num_query_blocks + i_q
        p_row = p_ids + o_row * capacity
        count = gl.load(p_counts + o_row)
        i_k = gl.load(p_row)
        i_k_next = gl.load(p_row + gl.minimum(1, capacity - 1))
        # a query block without rows computes nothing
        count = gl.where(rows > 0, count, 0)
    else:
        chunks_before = (first + _ROWS - 1) // _ROWS
        chunks = gl.maximum(chunks_before + (query_length - last + _ROWS - 1) // _ROWS, 1)
        i_bh = (i_t - num_rows) // chunks
        i_c = (i_t - num_rows) % chunks
        i_b = i_bh // heads
        i_h = i_bh % heads
        start = gl.where(i_c < chunks_before, i_c * _ROWS, last + (i_c - chunks_before) * _ROWS)
        rows = gl.minimum(gl.where(i_c < chunks_before, first, query_length) - start, _ROWS)
        rows = gl.where(i_b < batch, rows, 0)
        i_b = gl.minimum(i_b, batch - 1)
        count = 0
        i_k = 0
        i_k_next = 0
    return i_b, i_h, start, rows, shift, o_row, count, i_k, i_k_next


@gluon.jit
def _produce(tiles, rings, lists, keys, shape, inverse_scale, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
             RESIDUAL: gl.constexpr):  # fmt: skip
    """Picks rows of blocks, and streams for each its queries, then tiles of keys with the values of the tile before."""
    d_q, d_k, d_v, d_mean_k, d_mean_v = tiles
    s_q, s_k, s_v, s_row, s_flags, s_bias, s_last, q_full, q_empty, full, empty = rings
    p_ids, p_query_offsets, capacity = lists[1], lists[2], lists[7]
    p_key_offsets, p_map, p_next, stride_key_offsets_b, group, num_key_blocks = keys
    batch, heads, query_length, key_length, num_query_blocks = shape
    D: gl.constexpr = s_k.shape[2]
    Q_BYTES: gl.constexpr = _ROWS * D * 2
    TILE_BYTES: gl.constexpr = 2 * _COLUMNS * D * 2
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    o_c = gl.arange(0, _COLUMNS, layout=LAYOUT)

    first_query = gl.load(p_query_offsets)
    last_query = gl.load(p_query_offsets + num_query_blocks)
    chunks = (first_query + _ROWS - 1) // _ROWS + (query_length - last_query + _ROWS - 1) // _ROWS
    num_rows = batch * heads * num_query_blocks
    all_rows = num_rows + chunks * batch * heads

    # the values of the tile before; before the first there are none, and none means reading past the end, which is 0
    i_v_b = 0
    i_v_h = 0
    o_v = key_length
    v_is_mean = 0
    i_use = 0
    i_stage = 0
    phase = 1
    i_t = gl.program_id(0)
    i_b, i_h, start, rows, shift, o_row, count, i_k, i_k_next = _find_row(
        i_t, num_rows, first_query, last_query, lists, shape, CAUSAL
    )
    end = 0
    while end == 0:
        end = (i_t >= all_rows).to(gl.int32)
        i_kh = i_h // group
        p_row = p_ids + o_row * capacity
        p_starts = p_key_offsets + i_b * stride_key_offsets_b
        last = gl.maximum(count - 1, 0)
        # the key that the first query of the block still sees, and the first that none of them sees
        diagonal = start + shift
        visible_end = diagonal + rows

        slot = i_use & 1
        mbarrier.wait(q_empty.index(slot), ((i_use >> 1) & 1) ^ 1)
        _write(s_row.index(4 * slot), rows)
        _write(s_row.index(4 * slot + 1), (i_b * query_length + start) * heads + i_h)
        _write(s_row.index(4 * slot + 2), (i_b * heads + i_h) * query_length + start)
        _sync_threads()
        mbarrier.expect(q_full.index(slot), Q_BYTES)
        # queries that see nothing may hold anything
        o_q = gl.where(i_t < num_rows, start, query_length)
        _copy_tile(d_q, [i_b, i_h, o_q, 0], q_full.index(slot), s_q.index(2 * slot))
        _copy_tile(d_q, [i_b, i_h, o_q + _HALF, 0], q_full.index(slot), s_q.index(2 * slot + 1))
        i_use += 1

        # the next row is looked up early, for the latency
        i_t_next = i_t
        if end == 0:
            i_t_next = gl.atomic_add(p_next, 1, sem="relaxed") + gl.num_programs(0)
        next_row = _find_row(i_t_next, num_rows, first_query, last_query, lists, shape, CAUSAL)

        first = gl.load(p_starts + i_k)
        bound = gl.load(p_starts + gl.minimum(i_k + 1, num_key_blocks))
        key_end = gl.load(p_starts + num_key_blocks)
        i_n = 0
        i_mean = 0
        blocks_left = count > 0
        means_left = (rows > 0) & (i_t < num_rows) & (num_key_blocks > 0)
        if CAUSAL:
            blocks_left = blocks_left & (first < visible_end)
            means_left = means_left & (gl.load(p_starts) < visible_end)
        if not RESIDUAL:
            means_left = blocks_left
        more = 1
        new_row = _NEW_ROW + _END * end
        while more > 0:
            # ids are read two tiles ahead and boundaries one, for their latency
            next_first = gl.load(p_starts + i_k_next)
            next_bound = gl.load(p_starts + gl.minimum(i_k_next + 1, num_key_blocks))
            i_k_next = gl.load(p_row + gl.minimum(i_n + 2, last))

            # what lies past the last block may be NaN, and 0 * NaN would spread: the tile ends there
            origin = gl.minimum(first, key_end - _COLUMNS)
            first = gl.where(blocks_left, first - origin, 0)
            bound = gl.where(blocks_left, bound - origin, 0)
            is_mean = 0
            if RESIDUAL:
                is_mean = (means_left & (blocks_left == 0)).to(gl.int32)
            origin = gl.where(blocks_left, origin, gl.where(is_mean > 0, i_mean, key_length))
            masked = bound - first < _COLUMNS
            b_bias = gl.where((o_c >= first) & (o_c < bound), 0.0, float("-inf"))
            b_last = origin + o_c
            if CAUSAL:
                masked = masked | (origin + _COLUMNS - 1 > diagonal)
            if RESIDUAL:  # noqa: SIM102
                if is_mean > 0:
                    m_r = origin + o_c < num_key_blocks
                    b_skipped = gl.load(p_map + o_row * num_key_blocks + origin + o_c, mask=m_r, other=1) == 0
                    b_start = gl.load(p_starts + origin + o_c, mask=m_r, other=0)
                    b_end = gl.load(p_starts + origin + o_c + 1, mask=m_r, other=0)
                    # a mean counts as often as its block has tokens
                    b_bias = gl.log2(gl.maximum(b_end - b_start, 1).to(gl.float32)) * inverse_scale
                    b_bias = gl.where(b_skipped & (b_end > b_start), b_bias, float("-inf"))
                    b_last = b_end - 1
            flags = gl.where(masked, _MASKED, 0) + new_row

            mbarrier.wait(empty.index(i_stage), phase)
            _write(s_flags.index(i_stage), flags)
            if masked:
                s_bias.index(i_stage).store(b_bias)
                if CAUSAL:
                    b_last = gl.minimum(gl.maximum(b_last - diagonal, -1), _ROWS)
                    s_last.index(i_stage).store(b_last.to(gl.int16))
            _sync_threads()
            mbarrier.expect(full.index(i_stage), TILE_BYTES)
            if RESIDUAL:
                if is_mean > 0:
                    _copy_tile(d_mean_k, [i_b, i_kh, origin, 0], full.index(i_stage), s_k.index(i_stage))
                else:
                    _copy_tile(d_k, [i_b, i_kh, origin, 0], full.index(i_stage), s_k.index(i_stage))
                if v_is_mean > 0:
                    _copy_tile(d_mean_v, [i_v_b, i_v_h, o_v, 0], full.index(i_stage), s_v.index(i_stage))
                else:
                    _copy_tile(d_v, [i_v_b, i_v_h, o_v, 0], full.index(i_stage), s_v.index(i_stage))
            else:
                _copy_tile(d_k, [i_b, i_kh, origin, 0], full.index(i_stage), s_k.index(i_stage))
                _copy_tile(d_v, [i_v_b, i_v_h, o_v, 0], full.index(i_stage), s_v.index(i_stage))
            i_stage += 1
            if i_stage == STAGES:
                i_stage = 0
                phase ^= 1

            i_v_b = i_b
            i_v_h = i_kh
            o_v = origin
            v_is_mean = is_mean
            new_row = 0
            first = next_first
            bound = next_bound
            i_mean += is_mean * _COLUMNS
            i_n += 1
            blocks_left = i_n < count
            if CAUSAL:
                blocks_left = blocks_left & (first < visible_end)
            if RESIDUAL:
                means_left = means_left & (i_mean < num_key_blocks)
                if CAUSAL:
                    means_left = means_left & (gl.load(p_starts + gl.minimum(i_mean, num_key_blocks)) < visible_end)
                more = (blocks_left | means_left).to(gl.int32)
            else:
                more = blocks_left.to(gl.int32)
        i_t = i_t_next
        i_b, i_h, start, rows, shift, o_row, count, i_k, i_k_next = next_row
    # consumers look one tile ahead, past the end too
    mbarrier.wait(empty.index(i_stage), phase)
    _write(s_flags.index(i_stage), _NEW_ROW)
    _sync_threads()
    mbarrier.arrive(full.index(i_stage), count=1)


@gluon.jit
def _wait_for_scores(b_s, flags, s_bias, s_last, o_m, COLUMNS: gl.constexpr, CAUSAL: gl.constexpr,
                     FLIP: gl.constexpr):  # fmt: skip
    """Scores of a tile: -inf where a key is not this block's or not seen, with the weight of means; most tiles pass."""
    if flags & _MASKED > 0:
        # read while the product runs, for the latency
        b_bias = s_bias.load(COLUMNS)
        b_scores = warpgroup_mma_wait(1, deps=[b_s])
        if FLIP:
            b_scores = -b_scores
        b_scores += gl.expand_dims(b_bias, 0)
        if CAUSAL:
            m_s = gl.expand_dims(s_last.load(COLUMNS).to(gl.int32), 0) <= gl.expand_dims(o_m, 1)
            b_scores = gl.where(m_s, b_scores, float("-inf"))
    else:
        b_scores = warpgroup_mma_wait(1, deps=[b_s])
        if FLIP:
            b_scores = -b_scores
    return b_scores


@gluon.jit
def _online_softmax(b_s, b_max, scale_log2):
    """Probabilities of scores ``b_s`` (-inf where masked), the running maximum, and what rescales the sums so far.

    A maximum that stays rescales by exactly 1, for its difference is scaled: a multiply-add against the scaled pivot
    would be off by the pivot's rounding in every tile, and sums drift with their number.
    """
    b_new_max = gl.maximum(b_max, gl.max(b_s, 1))
    # a row with no valid key so far keeps a finite pivot, for -inf - -inf is NaN
    b_pivot = gl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_p = _exp2(b_s * scale_log2 - gl.expand_dims(b_pivot * scale_log2, 1))
    b_rescale = _exp2((b_max - b_pivot) * scale_log2)
    return b_p, b_new_max, b_rescale


@gluon.jit
def _sum_in_thread(b_p):
    """Sums of a row over the columns that one thread holds: four partial sums a row, which need no shuffles."""
    ROWS: gl.constexpr = b_p.shape[0]
    COLUMNS: gl.constexpr = b_p.shape[1]
    return gl.sum(gl.sum(b_p.reshape([ROWS, COLUMNS // 8, 4, 2]), 3), 1)


@gluon.jit
def _consume(rings, p_out, p_lse, heads, scale_log2, HALF: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
             RETURN_LSE: gl.constexpr, FLIP: gl.constexpr):  # fmt: skip
    """Attention of one half of the query rows of each row of blocks.

    The scores of a tile are computed while the values of the tile before are added up, across rows of blocks too.
    """
    s_q, s_k, s_v, s_row, s_flags, s_bias, s_last, q_full, q_empty, full, empty = rings
    D: gl.constexpr = s_k.shape[2]
    DTYPE: gl.constexpr = s_k.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    S_COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)

    o_m = HALF * _HALF + gl.arange(0, _HALF, layout=S_ROWS)
    o_o = HALF * _HALF + gl.arange(0, _HALF, layout=O_ROWS)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, O_LAYOUT))
    b_none = gl.zeros([_HALF, _COLUMNS], gl.float32, layout=S_LAYOUT)
    b_acc = gl.zeros([_HALF, D], gl.float32, layout=O_LAYOUT)
    b_p = gl.convert_layout(b_none.to(DTYPE), P_LAYOUT)
    b_max = gl.full([_HALF], float("-inf"), gl.float32, layout=S_ROWS)
    b_sum = _sum_in_thread(b_none)
    SUMS: gl.constexpr = b_sum.type.layout
    rows = 0
    o_out = gl.to_tensor(0)
    o_lse = 0
    i_row = 0
    i_stage = 0
    phase = 0
    mbarrier.wait(full.index(0), 0)
    flags = _read(s_flags.index(0))
    more = 1
    while more > 0:
        # the first tile of a row, and what is left of the row before
        more = (flags < _END).to(gl.int32)
        slot = i_row & 1
        mbarrier.wait(q_full.index(slot), (i_row >> 1) & 1)
        b_q = s_q.index(2 * slot + HALF)
        b_s = warpgroup_mma(b_q, s_k.index(i_stage).permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_acc = warpgroup_mma(b_p, s_v.index(i_stage), b_acc, is_async=True)
        next_rows = _read(s_row.index(4 * slot))
        next_out = _read(s_row.index(4 * slot + 1))
        next_lse = _read(s_row.index(4 * slot + 2))
        mbarrier.arrive(q_empty.index(slot ^ 1), count=1, pred=i_row > 0)
        b_s = _wait_for_scores(b_s, flags, s_bias.index(i_stage), s_last.index(i_stage), o_m, S_COLUMNS, CAUSAL, FLIP)
        b_row_max = b_max
        b_row_sum = b_sum
        b_max = gl.full([_HALF], float("-inf"), gl.float32, layout=S_ROWS)
        b_p, b_max, b_rescale = _online_softmax(b_s, b_max, scale_log2)
        b_sum = _sum_in_thread(b_p)
        b_p = gl.convert_layout(b_p.to(DTYPE), P_LAYOUT)
        i_before = i_stage
        i_stage += 1
        if i_stage == STAGES:
            i_stage = 0
            phase ^= 1
        mbarrier.wait(full.index(i_stage), phase)
        flags = _read(s_flags.index(i_stage))
        b_acc, b_sum = warpgroup_mma_wait(0, deps=[b_acc, b_sum])

        # a row that saw nothing has a sum of 0 and gives zeros
        b_row_sum = gl.convert_layout(gl.sum(b_row_sum, 1), S_ROWS)
        b_scale = gl.convert_layout(1.0 / gl.where(b_row_sum == 0.0, 1.0, b_row_sum), O_ROWS)
        b_out = (b_acc * gl.expand_dims(b_scale, 1)).to(DTYPE)
        p_rows = p_out + o_out.to(gl.int64) * D + gl.expand_dims(o_o.to(gl.int64) * (heads * D), 1)
        gl.store(p_rows + gl.expand_dims(o_d, 0), b_out, mask=gl.expand_dims(o_o < rows, 1))
        if RETURN_LSE:
            b_lse = (b_row_max * scale_log2 + gl.log2(b_row_sum)) * 0.6931471805599453
            gl.store(p_lse + o_lse + o_m, gl.where(b_row_sum == 0.0, float("-inf"), b_lse), mask=o_m < rows)
        rows = next_rows
        o_out = next_out
        o_lse = next_lse
        mbarrier.arrive(empty.index(i_before), count=1)
        b_acc = gl.zeros([_HALF, D], gl.float32, layout=O_LAYOUT)
        i_row += 1

        while flags < _NEW_ROW:
            b_s = warpgroup_mma(b_q, s_k.index(i_stage).permute((1, 0)), b_none, use_acc=False, is_async=True)
            b_acc = warpgroup_mma(b_p, s_v.index(i_stage), b_acc, is_async=True)
            b_s = _wait_for_scores(
                b_s, flags, s_bias.index(i_stage), s_last.index(i_stage), o_m, S_COLUMNS, CAUSAL, FLIP
            )
            b_p, b_max, b_rescale = _online_softmax(b_s, b_max, scale_log2)
            b_sum = b_sum * gl.expand_dims(gl.convert_layout(b_rescale, gl.SliceLayout(1, SUMS)), 1) + _sum_in_thread(
                b_p
            )
            b_p = gl.convert_layout(b_p.to(DTYPE), P_LAYOUT)
            i_before = i_stage
            i_stage += 1
            if i_stage == STAGES:
                i_stage = 0
                phase ^= 1
            # a branch here keeps the assembler from hoisting the wait above the exponentials
            mbarrier.wait(full.index(i_stage), phase)
            flags = _read(s_flags.index(i_stage))
            b_acc, b_sum = warpgroup_mma_wait(0, deps=[b_acc, b_sum])
            mbarrier.arrive(empty.index(i_before), count=1)
            b_acc *= gl.expand_dims(gl.convert_layout(b_rescale, O_ROWS), 1)


_INTEGERS = (
    "stride_row_b", "heads_per_mask", "stride_key_offsets_b", "stride_shifts_b", "capacity", "batch", "heads", "group",
    "query_length", "key_length", "num_query_blocks", "num_key_blocks",
)  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_forward_kernel(
    d_q, d_k, d_v, d_mean_k, d_mean_v, p_out, p_lse,
    p_counts, p_ids, p_query_offsets, p_key_offsets, p_map, p_shifts, p_next,
    stride_row_b, heads_per_mask, stride_key_offsets_b, stride_shifts_b, capacity,
    batch, heads, group, query_length, key_length, num_query_blocks, num_key_blocks, scale_log2, inverse_scale,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, RESIDUAL: gl.constexpr, RETURN_LSE: gl.constexpr, FLIP: gl.constexpr,
):  # fmt: skip
    """Programs share the rows of blocks of all heads, every one of which is a query block of up to 128 rows."""
    D: gl.constexpr = d_q.block_type.shape[3]
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_COLUMNS, D], d_q.dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_q = gl.allocate_shared_memory(d_q.dtype, [4, _HALF, D], TILE)
    s_k = gl.allocate_shared_memory(d_q.dtype, [STAGES, _COLUMNS, D], TILE)
    s_v = gl.allocate_shared_memory(d_q.dtype, [STAGES, _COLUMNS, D], TILE)
    s_row = gl.allocate_shared_memory(gl.int32, [8, 1], PLAIN)
    s_flags = gl.allocate_shared_memory(gl.int32, [STAGES, 1], PLAIN)
    s_bias = gl.allocate_shared_memory(gl.float32, [STAGES, _COLUMNS], PLAIN)
    s_last = gl.allocate_shared_memory(gl.int16, [STAGES, _COLUMNS], PLAIN)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)

    tiles = (d_q, d_k, d_v, d_mean_k, d_mean_v)
    rings = (s_q, s_k, s_v, s_row, s_flags, s_bias, s_last, q_full, q_empty, full, empty)
    lists = (p_counts, p_ids, p_query_offsets, p_shifts, stride_row_b, heads_per_mask, stride_shifts_b, capacity)
    keys = (p_key_offsets, p_map, p_next, stride_key_offsets_b, group, num_key_blocks)
    shape = (batch, heads, query_length, key_length, num_query_blocks)
    gl.warp_specialize(
        [
            (_consume, (rings, p_out, p_lse, heads, scale_log2, 0, STAGES, CAUSAL, RETURN_LSE, FLIP)),
            (_consume, (rings, p_out, p_lse, heads, scale_log2, 1, STAGES, CAUSAL, RETURN_LSE, FLIP)),
            (_produce, (tiles, rings, lists, keys, shape, inverse_scale, STAGES, CAUSAL, RESIDUAL)),
        ],
        [4, 1],
        [224, 56],  # registers a thread: all that two consumers need, and what is left
    )


def choose_stages(head_dim: int) -> int:
    """Stages that fit shared memory beside the queries: two of 128 × 128 tiles, or five of 128 × 64."""
    return 2 if head_dim == 128 else 5


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    causal: bool,
    residual: BlockMeans | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """One program per multiprocessor takes query blocks of up to 128 rows, and walks over their chosen blocks.

    See ``draftattn.kernels.api.block_sparse_attention`` for the arguments. Nothing is copied, and the host never
    waits for the device. Tokens outside the blocks may hold anything, with one exception: where the blocks of an item
    hold fewer than 128 keys, those before its first block must be finite.
    """
    batch, query_length, heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, query_length, dtype=torch.float32, device=query.device) if return_lse else None
    if out.numel() == 0 or block_mask.num_query_blocks == 0:
        return out.zero_(), None if lse is None else lse.fill_(float("-inf"))

    if block_mask.num_key_blocks == 0:
        residual = None
    key_length, group = key.shape[1], heads // key.shape[2]
    counts, ids = block_mask.kv_num_blocks.contiguous(), block_mask.kv_indices.contiguous()
    query_offsets, key_offsets = block_mask.query_offsets.contiguous(), block_mask.key_offsets.contiguous()
    block_map = ids if residual is None else block_mask.block_map.contiguous().view(torch.uint8)
    mask_batch, mask_heads, num_query_blocks = counts.shape
    shifts = block_mask.query_shifts
    stride_shifts_b = -1 if shifts is None else num_query_blocks * (shifts.ndim - 1)
    if ids.numel() == 0:
        ids = counts  # one id is read even of an empty list

    # without keys no tile is read, but a descriptor must describe something
    key, value = (query if x.shape[1] == 0 else x for x in (key, value))
    tiles = [_describe(query, _HALF.value), *(_describe(x, _COLUMNS.value) for x in (key, value))]
    tiles += tiles[1:] if residual is None else [_describe(x, _COLUMNS.value) for x in residual]
    programs = min(batch * heads * num_query_blocks, _multiprocessors(query.device))
    # a scale of 0 would make NaN of the masked scores
    scale_log2 = max(abs(scale) * _LOG2_E, 1e-30)
    with torch.cuda.device_of(query):
        attention_forward_kernel[(max(programs, 1),)](
            *tiles, out, out if lse is None else lse,
            counts, ids, query_offsets, key_offsets, block_map, counts if shifts is None else shifts.contiguous(),
            torch.zeros(1, dtype=torch.int32, device=query.device),
            mask_heads * num_query_blocks if mask_batch > 1 else 0, heads // mask_heads,
            key_offsets.stride(0) if key_offsets.ndim == 2 else 0, stride_shifts_b,
            max(block_mask.kv_indices.shape[-1], 1),
            batch, heads, group, query_length, key_length, num_query_blocks, block_mask.num_key_blocks,
            scale_log2, 1 / scale_log2,
            STAGES=choose_stages(head_dim), CAUSAL=causal, RESIDUAL=residual is not None, RETURN_LSE=return_lse,
            FLIP=scale < 0, num_warps=4,
        )  # fmt: skip
    return out, lse


def _describe(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of ``rows`` tokens of one head of ``[B, S, H, D]``; tokens outside the tensor read as zeros."""
    batch, length, heads, head_dim = x.shape
    # the stride of a dimension of 1 may be anything, and TMA wants multiples of 16 bytes
    strides = [
        head_dim if size == 1 else stride
        for size, stride in ((batch, x.stride(0)), (heads, x.stride(2)), (length, x.stride(1)))
    ]
    return TensorDescriptor(x, [batch, heads, length, head_dim], [*strides, 1], [1, 1, rows, head_dim], _tile_layout())


@functools.cache
def _tile_layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
