"""Triton kernels of the gradients of block-sparse attention, which `triton_backward` launches and explains."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_tile(p_x, o_row, m_row, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[rows, BLOCK_D]`` of a tensor whose rows begin at ``o_row`` (int64); zeros where a row is masked."""
    p_tile = p_x + o_row[:, None] + o_d[None, :]
    if D == BLOCK_D:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    return tl.load(p_tile, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _store_tile(p_x, o_row, m_row, o_d, b_x, D: tl.constexpr):
    p_tile = p_x + o_row[:, None] + o_d[None, :]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def _zero_rows(p_x, start, end, i_b, i_h, length, heads, o_d, PACK: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """Zeros for the tokens ``start : end`` of PACK heads of a contiguous ``[B, S, H, D]``."""
    b_zero = tl.zeros((64, BLOCK_D), dtype=tl.float32)
    for o_first in range(0, (end - start) * PACK, 64):
        o_r = o_first + tl.arange(0, 64)
        o_row = ((i_b * length + start + o_r // PACK) * heads + i_h + o_r % PACK) * D
        _store_tile(p_x, o_row, o_r < (end - start) * PACK, o_d, b_zero, D)


@triton.jit
def _offsets_in_tile(o_r, stride_s, stride_h, PACK: tl.constexpr):
    # 128 rows fit in 32 bits, which spares registers; the heads of a pack may lie far apart
    if PACK == 1:
        o_tile = o_r * stride_s
    else:
        o_tile = (o_r // PACK).to(tl.int64) * stride_s + (o_r % PACK).to(tl.int64) * stride_h
    return o_tile


@triton.jit
def _describe(p_x, first, last, stride_s, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """A descriptor of the tokens ``first : last`` of one head: TMA reads zeros past them, whatever lies there."""
    return tl.make_tensor_descriptor(
        p_x + first.to(tl.int64) * stride_s,
        shape=[tl.maximum(last - first, 1), D],
        strides=[stride_s, 1],
        block_shape=[ROWS, BLOCK_D],
    )


@triton.jit
def _is_seen(o_key, o_position, window_size, sink_end, whole, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys of a chosen block each query sees; the arguments broadcast to the tile."""
    m_s = o_key <= o_position if CAUSAL else o_key >= 0
    if WINDOW:
        m_s = m_s & ((o_key > o_position - window_size) | (o_key < sink_end) | (whole > 0))
    return m_s


@triton.jit
def row_terms_kernel(
    p_out, p_grad_out, p_lse, p_grad_lse, p_neg_lse, p_delta, p_query_offsets,
    stride_gb, stride_gs, stride_gh, stride_glb, stride_glh, stride_gls,
    heads, query_length, num_query_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """What every query row needs, by block: minus its LSE in base 2, and delta.

    Rows past the end of a block, and those that saw nothing, get -inf: their probabilities are then 0 without a mask.
    """
    i_q = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_m = tl.load(p_query_offsets + i_q) + tl.arange(0, BLOCK_L)
    m_m = o_m < tl.load(p_query_offsets + i_q + 1)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_L, BLOCK_D] outputs and their gradients
    b_out = _load_tile(p_out, ((i_b * query_length + o_m) * heads + i_h) * D, m_m, o_d, D, BLOCK_D)
    p_grad_out += i_b * stride_gb + i_h * stride_gh
    b_do = _load_tile(p_grad_out, o_m.to(tl.int64) * stride_gs, m_m, o_d, D, BLOCK_D)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    p_grad_lse += i_b * stride_glb + i_h * stride_glh
    b_delta -= tl.load(p_grad_lse + o_m.to(tl.int64) * stride_gls, mask=m_m, other=0.0)
    b_lse = tl.load(p_lse + (i_b * heads + i_h) * query_length + o_m, mask=m_m, other=float("-inf"))
    b_neg_lse = tl.where(b_lse == float("-inf"), b_lse, b_lse * -1.4426950408889634)
    o_term = ((i_b * heads + i_h) * num_query_blocks + i_q) * BLOCK_L + tl.arange(0, BLOCK_L)
    tl.store(p_neg_lse + o_term, b_neg_lse)
    tl.store(p_delta + o_term, b_delta)


@triton.jit
def _load_terms(p_terms, o_block, o_first, o_r, num_query_blocks, BLOCK_L: tl.constexpr, PACK: tl.constexpr, empty):
    """One of the terms of a tile's rows; ``o_block`` is the row of the (first) head and its block."""
    if PACK == 1:
        return tl.load(p_terms + o_block * BLOCK_L + o_first + o_r)
    o_term = (o_block + (o_r % PACK) * num_query_blocks) * BLOCK_L + o_r // PACK
    return tl.load(p_terms + o_term, mask=o_r < BLOCK_L * PACK, other=empty)


@triton.jit
def _add_query_gradient(b_q, b_do, b_k, b_v, b_bias, b_delta, m_s, b_dq, scale_log2):
    """Adds what a tile of keys ([N, D]) gives to dq ([M, D]); ``b_bias`` and ``m_s`` broadcast to [M, N]."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_p = tl.where(m_s, tl.exp2(b_s * scale_log2 + b_bias), 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def query_gradient_kernel(
    p_q, p_k, p_v, p_do, p_neg_lse, p_delta, p_dq,
    p_counts, p_ids, p_query_offsets, p_key_offsets, p_shifts, p_starts, p_whole,
    p_mean_k, p_mean_v, p_map,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh,
    stride_row_b, stride_row_h, capacity, stride_key_offsets_b, stride_shifts_b, stride_starts_b,
    scale, scale_log2, window_size, sink, heads, group, heads_per_mask,
    query_length, key_length, num_query_blocks, num_key_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    TILES_M: tl.constexpr, TILES_N: tl.constexpr, PACK: tl.constexpr, DESCRIPTORS: tl.constexpr,
    CAUSAL: tl.constexpr, SHIFTED: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, WHOLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows: the queries of a block of one head, or of PACK heads that share keys and pattern."""
    # the last rows first: they are the longest of a causal mask, and text attends to everything
    i_q = num_query_blocks - 1 - tl.program_id(0) // TILES_M
    i_h = tl.program_id(1).to(tl.int64) * PACK
    i_b = tl.program_id(2).to(tl.int64)
    i_kh = i_h // group
    o_d = tl.arange(0, BLOCK_D)

    # the grid holds one program more than tiles, for the rows before the first block and after the last
    if i_q < 0:
        after = tl.load(p_query_offsets + num_query_blocks)
        _zero_rows(p_dq, 0, tl.load(p_query_offsets), i_b, i_h, query_length, heads, o_d, PACK, D, BLOCK_D)
        _zero_rows(p_dq, after, query_length, i_b, i_h, query_length, heads, o_d, PACK, D, BLOCK_D)
        return

    start = tl.load(p_query_offsets + i_q)
    end = tl.load(p_query_offsets + i_q + 1)
    o_first = (tl.program_id(0) % TILES_M) * BLOCK_M
    if start + o_first // PACK >= end:
        return

    # [BLOCK_M] rows: tokens, and the heads of a pack
    o_r = o_first + tl.arange(0, BLOCK_M)
    m_m = o_r < (end - start) * PACK
    o_m = start + o_r // PACK
    o_h = i_h + o_r % PACK
    p_q += i_b * stride_qb
    p_do += i_b * stride_gb
    # [BLOCK_M, BLOCK_D] queries and output gradients
    b_q = _load_tile(p_q, o_m.to(tl.int64) * stride_qs + o_h * stride_qh, m_m, o_d, D, BLOCK_D)
    b_do = _load_tile(p_do, o_m.to(tl.int64) * stride_gs + o_h * stride_gh, m_m, o_d, D, BLOCK_D)
    o_block = (i_b * heads + i_h) * num_query_blocks + i_q
    b_neg_lse = _load_terms(p_neg_lse, o_block, o_first, o_r - o_first, num_query_blocks, BLOCK_L, PACK, float("-inf"))
    b_delta = _load_terms(p_delta, o_block, o_first, o_r - o_first, num_query_blocks, BLOCK_L, PACK, 0.0)
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)

    shift = key_length - query_length
    if SHIFTED:
        shift = tl.load(p_shifts + i_b * stride_shifts_b + i_q)
    # [BLOCK_M] where the queries stand among the keys
    o_position = o_m + shift
    o_block_row = i_b * stride_row_b + (i_h // heads_per_mask) * stride_row_h + i_q
    p_ids += o_block_row * capacity
    p_key_offsets += i_b * stride_key_offsets_b
    p_k += i_b * stride_kb + i_kh * stride_kh
    p_v += i_b * stride_vb + i_kh * stride_vh
    sink_end = 0
    if STARTS:
        sink_end = tl.load(p_starts + i_b * stride_starts_b + i_q) + sink
    elif WINDOW:
        sink_end = tl.load(p_key_offsets) + sink

    count = tl.load(p_counts + o_block_row)
    if CAUSAL:
        # ids ascend, so the blocks no row of this tile sees come last
        visible_end = tl.minimum(start + (o_first + BLOCK_M - 1) // PACK + 1, end) + shift
        visible = 0
        for o_c in range(0, count, 128):
            m_c = o_c + tl.arange(0, 128) < count
            b_id = tl.load(p_ids + o_c + tl.arange(0, 128), mask=m_c, other=0)
            visible += tl.sum((m_c & (tl.load(p_key_offsets + b_id) < visible_end)).to(tl.int32), 0)
        count = visible

    if DESCRIPTORS:
        first = tl.load(p_key_offsets)
        last = tl.load(p_key_offsets + num_key_blocks)
        d_k = _describe(p_k, first, last, stride_ks, D, BLOCK_D, BLOCK_N)
        d_v = _describe(p_v, first, last, stride_vs, D, BLOCK_D, BLOCK_N)
    o_n = tl.arange(0, BLOCK_N)
    # ids are read two tiles ahead and places one, for their latency
    last_id = tl.maximum(count - 1, 0)
    i_k = tl.load(p_ids, mask=count > 0, other=0)
    i_k_next = tl.load(p_ids + tl.minimum(1 // TILES_N, last_id), mask=count > 0, other=0)
    key_start = tl.load(p_key_offsets + i_k)
    key_end = tl.load(p_key_offsets + i_k + 1)
    whole = 0
    if WHOLE:
        p_whole += o_block_row * num_key_blocks
        whole = tl.load(p_whole + i_k).to(tl.int32)
    for i_n in range(0, count * TILES_N):
        o_start = key_start + (i_n % TILES_N) * BLOCK_N
        # [BLOCK_N] keys
        o_key = o_start + o_n
        m_n = o_key < key_end
        # [BLOCK_N, BLOCK_D] keys and values
        if DESCRIPTORS:
            b_k = d_k.load([o_start - first, 0])
            b_v = d_v.load([o_start - first, 0])
        else:
            b_k = _load_tile(p_k + o_start.to(tl.int64) * stride_ks, o_n * stride_ks, m_n, o_d, D, BLOCK_D)
            b_v = _load_tile(p_v + o_start.to(tl.int64) * stride_vs, o_n * stride_vs, m_n, o_d, D, BLOCK_D)
        m_s = m_n[None, :]
        if CAUSAL or WINDOW:
            m_s = m_s & _is_seen(o_key[None, :], o_position[:, None], window_size, sink_end, whole, CAUSAL, WINDOW)
        b_dq = _add_query_gradient(b_q, b_do, b_k, b_v, b_neg_lse[:, None], b_delta, m_s, b_dq, scale_log2)
        key_start = tl.load(p_key_offsets + i_k_next)
        key_end = tl.load(p_key_offsets + i_k_next + 1)
        if WHOLE:
            whole = tl.load(p_whole + i_k_next).to(tl.int32)
        i_k_next = tl.load(p_ids + tl.minimum((i_n + 2) // TILES_N, last_id))

    if RESIDUAL:
        p_map += o_block_row * num_key_blocks
        p_mean_k += (i_b * num_key_blocks * (heads // group) + i_kh) * D
        p_mean_v += (i_b * num_key_blocks * (heads // group) + i_kh) * D
        for o_block in range(0, num_key_blocks, BLOCK_R):
            o_k = o_block + tl.arange(0, BLOCK_R)
            m_r = o_k < num_key_blocks
            b_start = tl.load(p_key_offsets + o_k, mask=m_r, other=0)
            b_end = tl.load(p_key_offsets + o_k + 1, mask=m_r, other=0)
            m_r = m_r & (b_end > b_start) & (tl.load(p_map + o_k, mask=m_r, other=1) == 0)
            # [BLOCK_R], a mean counts as often as its block has tokens
            b_bias = tl.log2(tl.maximum(b_end - b_start, 1).to(tl.float32))
            o_row = o_k.to(tl.int64) * (heads // group) * D
            # [BLOCK_R, BLOCK_D] mean keys and values
            b_k = _load_tile(p_mean_k, o_row, m_r, o_d, D, BLOCK_D)
            b_v = _load_tile(p_mean_v, o_row, m_r, o_d, D, BLOCK_D)
            m_s = m_r[None, :]
            if CAUSAL:
                m_s = m_s & (b_end[None, :] <= o_position[:, None] + 1)
            b_bias = b_bias[None, :] + b_neg_lse[:, None]
            b_dq = _add_query_gradient(b_q, b_do, b_k, b_v, b_bias, b_delta, m_s, b_dq, scale_log2)

    o_row = ((i_b * query_length + o_m) * heads + o_h) * D
    _store_tile(p_dq, o_row, m_m, o_d, b_dq * scale, D)


@triton.jit
def _add_key_gradients(b_q, b_do, b_k, b_v, b_bias, b_delta, m_s, b_dk, b_dv, scale_log2, MASKED: tl.constexpr):
    """Adds what a tile of queries ([M, D]) gives to dk and dv ([N, D]); ``b_bias``, ``m_s`` broadcast to [N, M]."""
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_p = tl.exp2(b_s * scale_log2 + b_bias)
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def key_gradient_kernel(
    p_q, p_k, p_v, p_do, p_neg_lse, p_delta, p_dk, p_dv,
    p_counts, p_ids, p_query_offsets, p_key_offsets, p_shifts, p_starts, p_whole,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh,
    stride_row_b, stride_row_h, stride_column_b, stride_column_h, capacity,
    stride_key_offsets_b, stride_shifts_b, stride_starts_b,
    scale, scale_log2, window_size, sink, heads, group, heads_per_mask,
    query_length, key_length, num_query_blocks, num_key_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES_M: tl.constexpr, TILES_N: tl.constexpr, PACK: tl.constexpr, DESCRIPTORS: tl.constexpr,
    CAUSAL: tl.constexpr, SHIFTED: tl.constexpr, WINDOW: tl.constexpr, STARTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one key head, over the query blocks that attend to them, of the whole group."""
    # the longest first: a causal mask's first keys are seen most, and text, which stands last, by everything
    i_k = tl.program_id(0) // TILES_N
    if not CAUSAL:
        i_k = num_key_blocks - 1 - i_k
    i_kh = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    key_heads = heads // group
    o_d = tl.arange(0, BLOCK_D)
    p_key_offsets += i_b * stride_key_offsets_b

    # the grid holds one program more than tiles, for the keys before the first block and after the last
    if (i_k < 0) | (i_k == num_key_blocks):
        before = tl.load(p_key_offsets)
        after = tl.load(p_key_offsets + num_key_blocks)
        _zero_rows(p_dk, 0, before, i_b, i_kh, key_length, key_heads, o_d, 1, D, BLOCK_D)
        _zero_rows(p_dv, 0, before, i_b, i_kh, key_length, key_heads, o_d, 1, D, BLOCK_D)
        _zero_rows(p_dk, after, key_length, i_b, i_kh, key_length, key_heads, o_d, 1, D, BLOCK_D)
        _zero_rows(p_dv, after, key_length, i_b, i_kh, key_length, key_heads, o_d, 1, D, BLOCK_D)
        return

    start = tl.load(p_key_offsets + i_k) + (tl.program_id(0) % TILES_N) * BLOCK_N
    end = tl.load(p_key_offsets + i_k + 1)
    if start >= end:
        return

    # [BLOCK_N] keys
    o_key = start + tl.arange(0, BLOCK_N)
    m_n = o_key < end
    # [BLOCK_N, BLOCK_D] keys and values; rows past the end give gradients that are not stored
    p_k += i_b * stride_kb + i_kh * stride_kh
    p_v += i_b * stride_vb + i_kh * stride_vh
    b_k = _load_tile(p_k, o_key.to(tl.int64) * stride_ks, m_n, o_d, D, BLOCK_D)
    b_v = _load_tile(p_v, o_key.to(tl.int64) * stride_vs, m_n, o_d, D, BLOCK_D)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)

    p_q += i_b * stride_qb
    p_do += i_b * stride_gb
    p_shifts += i_b * stride_shifts_b
    p_starts += i_b * stride_starts_b
    shift = key_length - query_length
    sink_end = 0
    if WINDOW and not STARTS:
        sink_end = tl.load(p_key_offsets) + sink
    first = tl.load(p_query_offsets)
    last = tl.load(p_query_offsets + num_query_blocks)
    # rows of a tile: tokens, and the heads of a pack
    o_r = tl.arange(0, BLOCK_M)
    for i_g in range(0, group // PACK):
        i_h = i_kh * group + i_g * PACK
        i_mask_head = i_h // heads_per_mask
        o_column = i_b * stride_column_b + i_mask_head * stride_column_h + i_k
        p_list = p_ids + o_column * capacity
        count = tl.load(p_counts + o_column)
        hidden = 0
        if CAUSAL and not SHIFTED:
            # ids ascend, so the query blocks that see no key of this tile come first
            for o_c in range(0, count, 128):
                m_c = o_c + tl.arange(0, 128) < count
                b_id = tl.load(p_list + o_c + tl.arange(0, 128), mask=m_c, other=0)
                hidden += tl.sum((m_c & (tl.load(p_query_offsets + b_id + 1) + shift <= start)).to(tl.int32), 0)
        p_list += hidden
        count -= hidden
        # [BLOCK_M] offsets of the rows within a tile
        o_q = _offsets_in_tile(o_r, stride_qs, stride_qh, PACK)
        o_do = _offsets_in_tile(o_r, stride_gs, stride_gh, PACK)
        if DESCRIPTORS:
            d_q = _describe(p_q + i_h * stride_qh, first, last, stride_qs, D, BLOCK_D, BLOCK_M)
            d_do = _describe(p_do + i_h * stride_gh, first, last, stride_gs, D, BLOCK_D, BLOCK_M)

        # ids are read two tiles ahead and places one, for their latency
        last_id = tl.maximum(count - 1, 0)
        i_q = tl.load(p_list, mask=count > 0, other=0)
        i_q_next = tl.load(p_list + tl.minimum(1 // TILES_M, last_id), mask=count > 0, other=0)
        query_start = tl.load(p_query_offsets + i_q)
        query_end = tl.load(p_query_offsets + i_q + 1)
        o_block = (i_b * heads + i_h) * num_query_blocks + i_q
        block_shift, block_sink_end, whole = shift, sink_end, 0
        if SHIFTED:
            block_shift = tl.load(p_shifts + i_q)
        if STARTS:
            block_sink_end = tl.load(p_starts + i_q) + sink
        if WHOLE:
            p_rows = p_whole + (i_b * stride_row_b + i_mask_head * stride_row_h) * num_key_blocks + i_k
            whole = tl.load(p_rows + i_q.to(tl.int64) * num_key_blocks).to(tl.int32)
        for i_m in range(0, count * TILES_M):
            # a packed block is one tile
            o_start = query_start + (i_m % TILES_M) * BLOCK_M
            m_m = o_r < (query_end - o_start) * PACK
            # [BLOCK_M, BLOCK_D] queries and output gradients; a masked row has the probability 0
            if DESCRIPTORS:
                b_q = d_q.load([o_start - first, 0])
                b_do = d_do.load([o_start - first, 0])
            else:
                b_q = _load_tile(p_q + o_start.to(tl.int64) * stride_qs + i_h * stride_qh, o_q, m_m, o_d, D, BLOCK_D)
                b_do = _load_tile(p_do + o_start.to(tl.int64) * stride_gs + i_h * stride_gh, o_do, m_m, o_d, D, BLOCK_D)
            o_first = (i_m % TILES_M) * BLOCK_M
            b_neg_lse = _load_terms(p_neg_lse, o_block, o_first, o_r, num_query_blocks, BLOCK_L, PACK, float("-inf"))
            b_delta = _load_terms(p_delta, o_block, o_first, o_r, num_query_blocks, BLOCK_L, PACK, 0.0)
            m_s = m_n[:, None]
            if CAUSAL or WINDOW:
                o_position = (o_start + o_r // PACK + block_shift)[None, :]
                m_s = _is_seen(o_key[:, None], o_position, window_size, block_sink_end, whole, CAUSAL, WINDOW)
            b_dk, b_dv = _add_key_gradients(
                b_q, b_do, b_k, b_v, b_neg_lse[None, :], b_delta, m_s, b_dk, b_dv, scale_log2, CAUSAL or WINDOW
            )
            query_start = tl.load(p_query_offsets + i_q_next)
            query_end = tl.load(p_query_offsets + i_q_next + 1)
            o_block = (i_b * heads + i_h) * num_query_blocks + i_q_next
            if SHIFTED:
                block_shift = tl.load(p_shifts + i_q_next)
            if STARTS:
                block_sink_end = tl.load(p_starts + i_q_next) + sink
            if WHOLE:
                whole = tl.load(p_rows + i_q_next.to(tl.int64) * num_key_blocks).to(tl.int32)
            i_q_next = tl.load(p_list + tl.minimum((i_m + 2) // TILES_M, last_id))

    o_row = ((i_b * key_length + o_key) * key_heads + i_kh) * D
    _store_tile(p_dk, o_row, m_n, o_d, b_dk * scale, D)
    _store_tile(p_dv, o_row, m_n, o_d, b_dv, D)


@triton.jit
def mean_gradient_kernel(
    p_q, p_mean_k, p_mean_v, p_do, p_neg_lse, p_delta, p_dk, p_dv,
    p_map, p_query_offsets, p_key_offsets, p_shifts,
    stride_qb, stride_qs, stride_qh,
    stride_gb, stride_gs, stride_gh,
    stride_row_b, stride_row_h, stride_key_offsets_b, stride_shifts_b,
    scale, scale_log2, batch, heads, group, heads_per_mask,
    query_length, key_length, num_query_blocks, num_key_blocks, blocks_per_part,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    TILES_M: tl.constexpr, PACK: tl.constexpr, DESCRIPTORS: tl.constexpr,
    CAUSAL: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_R mean keys and values of one key head, from one part of the query blocks that skip them.

    ``p_dk`` and ``p_dv`` are float32 ``[parts, B, K, H_kv, D]``.
    """
    i_kh = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64) % batch
    i_part = tl.program_id(2) // batch
    key_heads = heads // group
    o_d = tl.arange(0, BLOCK_D)
    o_k = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_k < num_key_blocks
    p_key_offsets += i_b * stride_key_offsets_b
    b_start = tl.load(p_key_offsets + o_k, mask=m_r, other=0)
    b_end = tl.load(p_key_offsets + o_k + 1, mask=m_r, other=0)
    # [BLOCK_R], a mean counts as often as its block has tokens
    b_bias = tl.log2(tl.maximum(b_end - b_start, 1).to(tl.float32))
    m_used = m_r & (b_end > b_start)
    o_row = ((i_b * num_key_blocks + o_k) * key_heads + i_kh) * D
    # [BLOCK_R, BLOCK_D] mean keys and values
    b_k = _load_tile(p_mean_k, o_row, m_used, o_d, D, BLOCK_D)
    b_v = _load_tile(p_mean_v, o_row, m_used, o_d, D, BLOCK_D)
    b_dk = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)

    p_q += i_b * stride_qb
    p_do += i_b * stride_gb
    shift = key_length - query_length
    o_r = tl.arange(0, BLOCK_M)
    first = tl.load(p_query_offsets)
    last = tl.load(p_query_offsets + num_query_blocks)
    i_first = i_part * blocks_per_part
    i_last = tl.minimum(i_first + blocks_per_part, num_query_blocks)
    for i_g in range(0, group // PACK):
        i_h = i_kh * group + i_g * PACK
        p_rows = p_map + (i_b * stride_row_b + (i_h // heads_per_mask) * stride_row_h) * num_key_blocks
        o_q = _offsets_in_tile(o_r, stride_qs, stride_qh, PACK)
        o_do = _offsets_in_tile(o_r, stride_gs, stride_gh, PACK)
        if DESCRIPTORS:
            d_q = _describe(p_q + i_h * stride_qh, first, last, stride_qs, D, BLOCK_D, BLOCK_M)
            d_do = _describe(p_do + i_h * stride_gh, first, last, stride_gs, D, BLOCK_D, BLOCK_M)
        for i_m in range(i_first * TILES_M, i_last * TILES_M):
            i_q = i_m // TILES_M
            o_start = tl.load(p_query_offsets + i_q) + (i_m % TILES_M) * BLOCK_M
            m_m = o_r < (tl.load(p_query_offsets + i_q + 1) - o_start) * PACK
            # [BLOCK_M, BLOCK_D] queries and output gradients; a masked row has the probability 0
            if DESCRIPTORS:
                b_q = d_q.load([o_start - first, 0])
                b_do = d_do.load([o_start - first, 0])
            else:
                b_q = _load_tile(p_q + o_start.to(tl.int64) * stride_qs + i_h * stride_qh, o_q, m_m, o_d, D, BLOCK_D)
                b_do = _load_tile(p_do + o_start.to(tl.int64) * stride_gs + i_h * stride_gh, o_do, m_m, o_d, D, BLOCK_D)
            o_block = (i_b * heads + i_h) * num_query_blocks + i_q
            o_first = (i_m % TILES_M) * BLOCK_M
            b_neg_lse = _load_terms(p_neg_lse, o_block, o_first, o_r, num_query_blocks, BLOCK_L, PACK, float("-inf"))
            b_delta = _load_terms(p_delta, o_block, o_first, o_r, num_query_blocks, BLOCK_L, PACK, 0.0)
            p_row = p_rows + i_q.to(tl.int64) * num_key_blocks
            m_s = (m_used & (tl.load(p_row + o_k, mask=m_r, other=1) == 0))[:, None]
            if CAUSAL:
                block_shift = shift
                if SHIFTED:
                    block_shift = tl.load(p_shifts + i_b * stride_shifts_b + i_q)
                m_s = m_s & (b_end[:, None] <= (o_start + o_r // PACK + block_shift)[None, :] + 1)
            b_dk, b_dv = _add_key_gradients(
                b_q, b_do, b_k, b_v, b_bias[:, None] + b_neg_lse[None, :], b_delta, m_s, b_dk, b_dv, scale_log2, True
            )

    o_row += i_part.to(tl.int64) * batch * num_key_blocks * key_heads * D
    _store_tile(p_dk, o_row, m_r, o_d, b_dk * scale, D)
    _store_tile(p_dv, o_row, m_r, o_d, b_dv, D)
