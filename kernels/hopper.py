"""Block-sparse attention for Hopper GPUs (sm_90) in Gluon, warp-specialised, forward only.

Two warpgroups of 64 query rows each multiply and take the softmax; one warp schedules, and feeds them through TMA.
Gluon is experimental and differs between Triton versions: every use of it is in this module.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

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
def _count_visible(p_row, p_key_offsets, count, visible_end):
    """How many of a row's first ``count`` blocks begin before ``visible_end``; ids ascend, so they come first."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    o_c = gl.arange(0, _COLUMNS, layout=layout)
    b_seen = gl.zeros([_COLUMNS], gl.int32, layout=layout)
    for o_id in range(0, count, _COLUMNS):
        m_id = o_id + o_c < count
        b_start = gl.load(p_key_offsets + gl.load(p_row + o_id + o_c, mask=m_id, other=0))
        b_seen += (m_id & (b_start < visible_end)).to(gl.int32)
    return gl.sum(b_seen, 0)


@gluon.jit
def _write_columns(s_bias, s_last, p_map, p_key_offsets, first, bound, origin, is_mean, num_key_blocks, diagonal,
                   inverse_scale, CAUSAL: gl.constexpr, RESIDUAL: gl.constexpr):  # fmt: skip
    """What the columns of a tile need: a bias in units of raw scores, and for causal the first row that sees them.

    The keys of a block begin at column ``first`` and end before ``bound``. Means stand for the blocks from ``origin``.
    """
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    o_c = gl.arange(0, _COLUMNS, layout=layout)
    b_bias = gl.where((o_c >= first) & (o_c < bound), 0.0, float("-inf"))
    b_last = origin + o_c
    if RESIDUAL:  # noqa: SIM102
        if is_mean:
            m_r = origin + o_c < num_key_blocks
            b_skipped = gl.load(p_map + origin + o_c, mask=m_r, other=1) == 0
            b_start = gl.load(p_key_offsets + origin + o_c, mask=m_r, other=0)
            b_end = gl.load(p_key_offsets + origin + o_c + 1, mask=m_r, other=0)
            # a mean counts as often as its block has tokens
            b_bias = gl.log2(gl.maximum(b_end - b_start, 1).to(gl.float32)) * inverse_scale
            b_bias = gl.where(b_skipped & (b_end > b_start), b_bias, float("-inf"))
            b_last = b_end - 1
    s_bias.store(b_bias)
    if CAUSAL:
        s_last.store(b_last - diagonal)


@gluon.jit
def _produce(tiles, rings, mask, shape, inverse_scale, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
             RESIDUAL: gl.constexpr, DYNAMIC: gl.constexpr):  # fmt: skip
    """Picks rows of blocks, and streams for each its queries, then key and value tiles."""
    d_q, d_k, d_v, d_mean_k, d_mean_v = tiles
    s_q, s_k, s_v, s_row, s_flags, s_bias, s_last, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    p_counts, p_ids, p_query_offsets, p_key_offsets, p_map, p_next, strides = mask
    stride_row_b, stride_row_h, stride_key_offsets_b, capacity = strides
    batch, heads, group, query_length, key_length, num_query_blocks, num_key_blocks = shape
    D: gl.constexpr = s_k.shape[2]
    Q_BYTES: gl.constexpr = _ROWS * D * 2
    TILE_BYTES: gl.constexpr = _COLUMNS * D * 2
    num_rows = batch * heads * num_query_blocks
    i_fill = 0
    i_use = 0
    i_t = gl.program_id(0)
    while i_t < num_rows:
        i_q = i_t % num_query_blocks
        i_h = (i_t // num_query_blocks) % heads
        i_b = i_t // (num_query_blocks * heads)
        if CAUSAL:
            i_q = num_query_blocks - 1 - i_q  # the longest rows first
        start = gl.load(p_query_offsets + i_q)
        end = gl.load(p_query_offsets + i_q + 1)
        o_row = i_b.to(gl.int64) * stride_row_b + i_h.to(gl.int64) * stride_row_h + i_q
        p_row = p_ids + o_row * capacity
        p_starts = p_key_offsets + i_b * stride_key_offsets_b
        key_end = gl.load(p_starts + num_key_blocks)
        count = gl.load(p_counts + o_row)
        # the key that the first query of the block still sees
        diagonal = start + key_length - query_length
        if CAUSAL:
            count = _count_visible(p_row, p_starts, count, end + key_length - query_length)
        total = count
        if RESIDUAL:
            total += (num_key_blocks + _COLUMNS - 1) // _COLUMNS
        # a query block without rows computes nothing
        total = gl.where(end > start, total, 0)
        count = gl.minimum(count, total)

        mbarrier.wait(q_empty, (i_use & 1) ^ 1)
        _write(s_row.index(0), total)
        _write(s_row.index(1), end - start)
        _write(s_row.index(2), (i_b * query_length + start) * heads + i_h)
        _write(s_row.index(3), (i_b * heads + i_h) * query_length + start)
        _write(s_row.index(4), heads)
        _sync_threads()
        mbarrier.expect(q_full, Q_BYTES)
        _copy_tile(d_q, [i_b, i_h, start, 0], q_full, s_q.index(0))
        _copy_tile(d_q, [i_b, i_h, start + _HALF, 0], q_full, s_q.index(1))
        i_use += 1

        i_kh = i_h // group
        last = gl.maximum(count - 1, 0)
        origin = 0
        # ids are read two tiles ahead, for their latency
        i_k = gl.load(p_row)
        i_k_next = gl.load(p_row + gl.minimum(1, last))
        # consumers free the key tile i_n + 1 before the value tile i_n, so keys run one tile ahead
        for i_n in range(0, total + 1):
            previous = origin
            if i_n < total:
                i_stage = i_fill % STAGES
                i_phase = (i_fill // STAGES) & 1
                first = gl.load(p_starts + i_k)
                bound = gl.load(p_starts + i_k + 1)
                i_k = i_k_next
                i_k_next = gl.load(p_row + gl.minimum(i_n + 2, last))
                # what lies past the last block may be NaN, and 0 * NaN would spread: the tile ends there
                origin = gl.minimum(first, key_end - _COLUMNS)
                first -= origin
                bound -= origin
                flags = (bound - first < _COLUMNS).to(gl.int32)
                if CAUSAL:
                    flags += 2 * (origin + _COLUMNS - 1 > diagonal).to(gl.int32)
                if RESIDUAL:  # noqa: SIM102
                    if i_n >= count:
                        origin = (i_n - count) * _COLUMNS
                        flags = 3
                mbarrier.wait(k_empty.index(i_stage), i_phase ^ 1)
                _write(s_flags.index(i_stage), flags)
                if flags > 0:
                    p_row_map = p_map + o_row * num_key_blocks
                    _write_columns(s_bias.index(i_stage), s_last.index(i_stage), p_row_map, p_starts, first, bound,
                                   origin, i_n >= count, num_key_blocks, diagonal, inverse_scale,
                                   CAUSAL, RESIDUAL)  # fmt: skip
                _sync_threads()
                mbarrier.expect(k_full.index(i_stage), TILE_BYTES)
                if RESIDUAL:
                    if i_n < count:
                        _copy_tile(d_k, [i_b, i_kh, origin, 0], k_full.index(i_stage), s_k.index(i_stage))
                    else:
                        _copy_tile(d_mean_k, [i_b, i_kh, origin, 0], k_full.index(i_stage), s_k.index(i_stage))
                else:
                    _copy_tile(d_k, [i_b, i_kh, origin, 0], k_full.index(i_stage), s_k.index(i_stage))
                i_fill += 1
            if i_n > 0:
                i_before = i_fill - 1 - (i_n < total).to(gl.int32)
                i_stage = i_before % STAGES
                mbarrier.wait(v_empty.index(i_stage), ((i_before // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(i_stage), TILE_BYTES)
                if RESIDUAL:
                    if i_n <= count:
                        _copy_tile(d_v, [i_b, i_kh, previous, 0], v_full.index(i_stage), s_v.index(i_stage))
                    else:
                        _copy_tile(d_mean_v, [i_b, i_kh, previous, 0], v_full.index(i_stage), s_v.index(i_stage))
                else:
                    _copy_tile(d_v, [i_b, i_kh, previous, 0], v_full.index(i_stage), s_v.index(i_stage))
        if DYNAMIC:
            i_t = gl.atomic_add(p_next, 1) + gl.num_programs(0)
        else:
            i_t += gl.num_programs(0)

    # rows before the first query block and after the last: 128 at a time, without any tile, which gives zeros
    first = gl.load(p_query_offsets)
    last = gl.load(p_query_offsets + num_query_blocks)
    chunks_before = (first + _ROWS - 1) // _ROWS
    chunks = chunks_before + (query_length - last + _ROWS - 1) // _ROWS
    for i_c in range(gl.program_id(0), chunks * batch * heads, gl.num_programs(0)):
        i_h = i_c // chunks
        i_c = i_c % chunks
        start = gl.where(i_c < chunks_before, i_c * _ROWS, last + (i_c - chunks_before) * _ROWS)
        end = gl.where(i_c < chunks_before, first, query_length)
        mbarrier.wait(q_empty, (i_use & 1) ^ 1)
        _write(s_row.index(0), 0)
        _write(s_row.index(1), gl.minimum(end - start, _ROWS))
        _write(s_row.index(2), ((i_h // heads) * query_length + start) * heads + i_h % heads)
        _write(s_row.index(3), i_h * query_length + start)
        _write(s_row.index(4), heads)
        _sync_threads()
        mbarrier.arrive(q_full, count=1)
        i_use += 1
    mbarrier.wait(q_empty, (i_use & 1) ^ 1)
    _write(s_row.index(0), -1)
    _sync_threads()
    mbarrier.arrive(q_full, count=1)


@gluon.jit
def _mask_scores(b_s, i_stage, s_flags, s_bias, s_last, o_m, CAUSAL: gl.constexpr, FLIP: gl.constexpr):
    """Scores with -inf where a key is not this block's or not seen, and with the weight of means; most tiles pass."""
    if FLIP:
        b_s = -b_s
    layout: gl.constexpr = gl.SliceLayout(0, b_s.type.layout)
    flags = _read(s_flags.index(i_stage))
    if flags % 2 > 0:
        b_s += gl.expand_dims(s_bias.index(i_stage).load(layout), 0)
    if CAUSAL:  # noqa: SIM102
        if flags > 1:
            m_s = gl.expand_dims(s_last.index(i_stage).load(layout), 0) <= gl.expand_dims(o_m, 1)
            b_s = gl.where(m_s, b_s, float("-inf"))
    return b_s


@gluon.jit
def _online_softmax(b_s, b_max, b_sum, scale_log2):
    """Probabilities of scores ``b_s`` (-inf where masked), the running softmax, and what rescales its sums so far."""
    b_new_max = gl.maximum(b_max, gl.max(b_s, 1))
    # a row with no valid key so far keeps a finite pivot, for -inf - -inf is NaN
    b_pivot = gl.where(b_new_max == float("-inf"), 0.0, b_new_max * scale_log2)
    b_p = _exp2(b_s * scale_log2 - gl.expand_dims(b_pivot, 1))
    b_rescale = _exp2(b_max * scale_log2 - b_pivot)
    return b_p, b_new_max, b_sum * b_rescale + gl.sum(b_p, 1), b_rescale


@gluon.jit
def _consume(rings, p_out, p_lse, scale_log2, HALF: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
             RETURN_LSE: gl.constexpr, FLIP: gl.constexpr):  # fmt: skip
    """Attention of one half of the query rows of each row of blocks."""
    s_q, s_k, s_v, s_row, s_flags, s_bias, s_last, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    D: gl.constexpr = s_k.shape[2]
    DTYPE: gl.constexpr = s_k.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    # 16 bytes a thread, whole rows
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])

    o_half = HALF * _HALF + gl.arange(0, _HALF, layout=S_ROWS)
    o_m = HALF * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(1, STORE))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
    b_q = s_q.index(HALF)
    i_use = 0
    i_row = 0
    mbarrier.wait(q_full, 0)
    total = _read(s_row.index(0))
    while total >= 0:
        rows = _read(s_row.index(1))
        o_out = _read(s_row.index(2))
        o_lse = _read(s_row.index(3))
        stride = _read(s_row.index(4)) * D
        b_acc = gl.zeros([_HALF, D], gl.float32, layout=O_LAYOUT)
        b_max = gl.full([_HALF], float("-inf"), gl.float32, layout=S_ROWS)
        b_sum = gl.zeros([_HALF], gl.float32, layout=S_ROWS)
        b_none = gl.zeros([_HALF, _COLUMNS], gl.float32, layout=S_LAYOUT)
        if total > 0:
            i_stage = i_use % STAGES
            mbarrier.wait(k_full.index(i_stage), (i_use // STAGES) & 1)
            b_s = warpgroup_mma(b_q, s_k.index(i_stage).permute((1, 0)), b_none, use_acc=False, is_async=True)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            b_s = _mask_scores(b_s, i_stage, s_flags, s_bias, s_last, o_half, CAUSAL, FLIP)
            mbarrier.arrive(k_empty.index(i_stage), count=1)
            b_p, b_max, b_sum, b_rescale = _online_softmax(b_s, b_max, b_sum, scale_log2)
            b_p = gl.convert_layout(b_p.to(DTYPE), P_LAYOUT)
            i_use += 1
            mbarrier.wait(k_full.index(i_use % STAGES), (i_use // STAGES) & 1, pred=total > 1)
            for i_n in range(1, total):
                i_stage = i_use % STAGES
                i_before = (i_use - 1) % STAGES
                b_s = warpgroup_mma(b_q, s_k.index(i_stage).permute((1, 0)), b_none, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(i_before), ((i_use - 1) // STAGES) & 1)
                b_acc = warpgroup_mma(b_p, s_v.index(i_before), b_acc, is_async=True)
                b_s = warpgroup_mma_wait(1, deps=[b_s])
                b_s = _mask_scores(b_s, i_stage, s_flags, s_bias, s_last, o_half, CAUSAL, FLIP)
                mbarrier.arrive(k_empty.index(i_stage), count=1)
                b_p, b_max, b_sum, b_rescale = _online_softmax(b_s, b_max, b_sum, scale_log2)
                b_p = gl.convert_layout(b_p.to(DTYPE), P_LAYOUT)
                i_use += 1
                # a branch here keeps the assembler from hoisting the wait above the exponentials
                mbarrier.wait(k_full.index(i_use % STAGES), (i_use // STAGES) & 1, pred=i_n + 1 < total)
                b_acc, b_sum = warpgroup_mma_wait(0, deps=[b_acc, b_sum])
                mbarrier.arrive(v_empty.index(i_before), count=1)
                b_acc *= gl.expand_dims(gl.convert_layout(b_rescale, O_ROWS), 1)
            mbarrier.arrive(q_empty, count=1)
            i_before = (i_use - 1) % STAGES
            mbarrier.wait(v_full.index(i_before), ((i_use - 1) // STAGES) & 1)
            b_acc = warpgroup_mma(b_p, s_v.index(i_before), b_acc, is_async=True)
            b_acc = warpgroup_mma_wait(0, deps=[b_acc])
            mbarrier.arrive(v_empty.index(i_before), count=1)
        else:
            mbarrier.arrive(q_empty, count=1)

        # a row that saw nothing has a sum of 0 and gives zeros
        b_scale = gl.convert_layout(1.0 / gl.where(b_sum == 0.0, 1.0, b_sum), O_ROWS)
        b_out = gl.convert_layout((b_acc * gl.expand_dims(b_scale, 1)).to(DTYPE), STORE)
        p_rows = p_out + o_out.to(gl.int64) * D + gl.expand_dims(o_m.to(gl.int64) * stride, 1)
        gl.store(p_rows + gl.expand_dims(o_d, 0), b_out, mask=gl.expand_dims(o_m < rows, 1))
        if RETURN_LSE:
            b_lse = (b_max * scale_log2 + gl.log2(b_sum)) * 0.6931471805599453
            gl.store(p_lse + o_lse + o_half, gl.where(b_sum == 0.0, float("-inf"), b_lse), mask=o_half < rows)
        i_row += 1
        mbarrier.wait(q_full, i_row & 1)
        total = _read(s_row.index(0))


_INTEGERS = (
    "stride_row_b", "stride_row_h", "stride_key_offsets_b", "capacity", "batch", "heads", "group", "query_length",
    "key_length", "num_query_blocks", "num_key_blocks",
)  # fmt: skip


@gluon.jit(do_not_specialize=_INTEGERS)
def attention_forward_kernel(
    d_q, d_k, d_v, d_mean_k, d_mean_v, p_out, p_lse,
    p_counts, p_ids, p_query_offsets, p_key_offsets, p_map, p_next,
    stride_row_b, stride_row_h, stride_key_offsets_b, capacity,
    batch, heads, group, query_length, key_length, num_query_blocks, num_key_blocks, scale_log2, inverse_scale,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, RESIDUAL: gl.constexpr, RETURN_LSE: gl.constexpr, FLIP: gl.constexpr,
    DYNAMIC: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Programs share the rows of blocks of all heads, every one of which is a query block of up to 128 rows."""
    D: gl.constexpr = d_q.block_type.shape[3]
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_COLUMNS, D], d_q.dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_q = gl.allocate_shared_memory(d_q.dtype, [2, _HALF, D], TILE)
    s_k = gl.allocate_shared_memory(d_q.dtype, [STAGES, _COLUMNS, D], TILE)
    s_v = gl.allocate_shared_memory(d_q.dtype, [STAGES, _COLUMNS, D], TILE)
    s_row = gl.allocate_shared_memory(gl.int32, [5, 1], PLAIN)
    s_flags = gl.allocate_shared_memory(gl.int32, [STAGES, 1], PLAIN)
    s_bias = gl.allocate_shared_memory(gl.float32, [STAGES, _COLUMNS], PLAIN)
    s_last = gl.allocate_shared_memory(gl.int32, [STAGES, _COLUMNS], PLAIN)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)

    tiles = (d_q, d_k, d_v, d_mean_k, d_mean_v)
    rings = (s_q, s_k, s_v, s_row, s_flags, s_bias, s_last, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    strides = (stride_row_b, stride_row_h, stride_key_offsets_b, capacity)
    mask = (p_counts, p_ids, p_query_offsets, p_key_offsets, p_map, p_next, strides)
    shape = (batch, heads, group, query_length, key_length, num_query_blocks, num_key_blocks)
    gl.warp_specialize(
        [
            (_consume, (rings, p_out, p_lse, scale_log2, 0, STAGES, CAUSAL, RETURN_LSE, FLIP)),
            (_consume, (rings, p_out, p_lse, scale_log2, 1, STAGES, CAUSAL, RETURN_LSE, FLIP)),
            (_produce, (tiles, rings, mask, shape, inverse_scale, STAGES, CAUSAL, RESIDUAL, DYNAMIC)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


class Launch(NamedTuple):
    """How the kernel is compiled and how many programs share the rows."""

    stages: int = 2
    persistent: bool = True
    dynamic: bool = True
    consumer_registers: int = 232
    producer_registers: int = 40


def choose_launch(head_dim: int) -> Launch:
    """The launch options for a head dimension; shared memory holds two stages of 128 × 128 or three of 128 × 64."""
    return Launch(stages=2 if head_dim == 128 else 3)


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
    waits for the device.
    """
    batch, query_length, heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, query_length, device=query.device) if return_lse else None
    if out.numel() == 0:
        return out, lse

    if block_mask.num_key_blocks == 0:
        residual = None
    key_length, group = key.shape[1], heads // key.shape[2]
    counts, ids = block_mask.kv_num_blocks.contiguous(), block_mask.kv_indices.contiguous()
    query_offsets, key_offsets = block_mask.query_offsets.contiguous(), block_mask.key_offsets.contiguous()
    block_map = ids if residual is None else block_mask.block_map.contiguous().view(torch.uint8)
    mask_batch, mask_heads, num_query_blocks = counts.shape
    if ids.numel() == 0:
        ids = counts  # one id is read even of an empty list

    # without keys no tile is read, but a descriptor must describe something
    key, value = (query if x.shape[1] == 0 else x for x in (key, value))
    means = (key, value) if residual is None else residual
    tiles = [_describe(query, _HALF.value), *(_describe(x, _COLUMNS.value) for x in (key, value, *means))]
    launch = choose_launch(head_dim)
    rows = batch * heads * num_query_blocks
    programs = min(rows, _multiprocessors(query.device)) if launch.persistent else rows
    # a scale of 0 would make NaN of the masked scores
    scale_log2 = max(abs(scale) * _LOG2_E, 1e-30)
    with torch.cuda.device_of(query):
        attention_forward_kernel[(max(programs, 1),)](
            *tiles, out, out if lse is None else lse,
            counts, ids, query_offsets, key_offsets, block_map,
            torch.zeros(1, dtype=torch.int32, device=query.device) if launch.dynamic else counts,
            mask_heads * num_query_blocks if mask_batch > 1 else 0, num_query_blocks if mask_heads > 1 else 0,
            key_offsets.stride(0) if key_offsets.ndim == 2 else 0, block_mask.kv_indices.shape[-1],
            batch, heads, group, query_length, key_length, num_query_blocks, block_mask.num_key_blocks,
            scale_log2, 1 / scale_log2,
            STAGES=launch.stages, CAUSAL=causal, RESIDUAL=residual is not None, RETURN_LSE=return_lse,
            FLIP=scale < 0, DYNAMIC=launch.dynamic,
            CONSUMER_REGISTERS=launch.consumer_registers, PRODUCER_REGISTERS=launch.producer_registers,
            num_warps=4,
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
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, [batch, heads, length, head_dim], [*strides, 1], [1, 1, rows, head_dim], layout)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
