"""Statistics of ragged blocks of tokens, in Triton: up to three tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.pooling import PooledBlocks, PoolRequest, output_shape

_TENSORS_PER_LAUNCH = 3


class Tiling(NamedTuple):
    """How a program reads its block: ``heads`` neighbours at once, in tiles of at most ``tile`` numbers."""

    heads: int = 1
    tile: int = 4096
    num_warps: int = 2


@triton.jit
def _pool_block(
    i_p, p_x, p_mean, p_rounded, p_maximum, p_mean_square, p_offsets, num_blocks, heads,
    stride_xb, stride_xs, stride_xh, stride_xd, stride_offsets_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Reads one block of BLOCK_H heads once; outputs that are None are not made."""
    # programs that run together read the heads of one block, which are neighbours in memory
    programs_h = tl.cdiv(heads, BLOCK_H)
    i_n = i_p // programs_h % num_blocks
    i_b = (i_p // programs_h // num_blocks).to(tl.int64)
    p_offsets += i_b * stride_offsets_b + i_n
    start = tl.load(p_offsets)
    end = tl.load(p_offsets + 1)
    # [C] channels of all heads of the program
    o_c = tl.arange(0, BLOCK_H * BLOCK_D)
    o_h = i_p % programs_h * BLOCK_H + o_c // BLOCK_D
    o_d = o_c % BLOCK_D
    m_c = (o_h < heads) & (o_d < D)
    p_x += i_b * stride_xb
    p_row = p_x + (o_h.to(tl.int64) * stride_xh + o_d * stride_xd)[None, :]
    # [ROWS, C], reduced over the rows only once at the end
    b_sum = tl.zeros((ROWS, BLOCK_H * BLOCK_D), dtype=tl.float32)
    b_max = tl.full((ROWS, BLOCK_H * BLOCK_D), float("-inf"), dtype=tl.float32)
    b_square = tl.zeros((ROWS, BLOCK_H * BLOCK_D), dtype=tl.float32)
    for o_row in tl.static_range(0, BLOCK_S, ROWS):
        o_s = start + o_row + tl.arange(0, ROWS)
        m_x = (o_s < end)[:, None] & m_c[None, :]
        b_x = tl.load(p_row + o_s.to(tl.int64)[:, None] * stride_xs, mask=m_x, other=0.0).to(tl.float32)
        b_sum += b_x
        if p_maximum is not None:
            b_max = tl.maximum(b_max, tl.where(m_x, b_x, float("-inf")))
        if p_mean_square is not None:
            b_square += b_x * b_x

    o_out = (i_b * num_blocks + i_n) * heads * D + o_h * D + o_d
    count = tl.maximum(end - start, 1).to(tl.float32)
    b_mean = tl.sum(b_sum, 0) / count
    tl.store(p_mean + o_out, b_mean, mask=m_c)
    if p_rounded is not None:
        tl.store(p_rounded + o_out, b_mean.to(p_rounded.dtype.element_ty), mask=m_c)
    if p_maximum is not None:
        b_maximum = tl.where(end > start, tl.max(b_max, 0), 0.0)
        tl.store(p_maximum + o_out, b_maximum, mask=m_c)
    if p_mean_square is not None:
        tl.store(p_mean_square + o_out, tl.sum(b_square, 0) / count, mask=m_c)


_COUNTS = [f"{name}_{i}" for name in ("programs", "num_blocks", "heads") for i in range(_TENSORS_PER_LAUNCH)]


@triton.jit(do_not_specialize=_COUNTS)
def pool_blocks_kernel(
    p_x_0, p_mean_0, p_rounded_0, p_maximum_0, p_mean_square_0, p_offsets_0, programs_0, num_blocks_0, heads_0,
    stride_xb_0, stride_xs_0, stride_xh_0, stride_xd_0, stride_offsets_b_0,
    p_x_1, p_mean_1, p_rounded_1, p_maximum_1, p_mean_square_1, p_offsets_1, programs_1, num_blocks_1, heads_1,
    stride_xb_1, stride_xs_1, stride_xh_1, stride_xd_1, stride_offsets_b_1,
    p_x_2, p_mean_2, p_rounded_2, p_maximum_2, p_mean_square_2, p_offsets_2, programs_2, num_blocks_2, heads_2,
    stride_xb_2, stride_xs_2, stride_xh_2, stride_xd_2, stride_offsets_b_2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The programs of the first tensor, then those of the second and the third; tensors that are None have none."""
    i_p = tl.program_id(0)
    if i_p < programs_0:
        _pool_block(
            i_p, p_x_0, p_mean_0, p_rounded_0, p_maximum_0, p_mean_square_0, p_offsets_0, num_blocks_0, heads_0,
            stride_xb_0, stride_xs_0, stride_xh_0, stride_xd_0, stride_offsets_b_0,
            D, BLOCK_D, BLOCK_H, BLOCK_S, ROWS,
        )  # fmt: skip
    elif i_p < programs_0 + programs_1:
        if p_x_1 is not None:
            _pool_block(
                i_p - programs_0,
                p_x_1, p_mean_1, p_rounded_1, p_maximum_1, p_mean_square_1, p_offsets_1, num_blocks_1, heads_1,
                stride_xb_1, stride_xs_1, stride_xh_1, stride_xd_1, stride_offsets_b_1,
                D, BLOCK_D, BLOCK_H, BLOCK_S, ROWS,
            )  # fmt: skip
    elif p_x_2 is not None:
        _pool_block(
            i_p - programs_0 - programs_1,
            p_x_2, p_mean_2, p_rounded_2, p_maximum_2, p_mean_square_2, p_offsets_2, num_blocks_2, heads_2,
            stride_xb_2, stride_xs_2, stride_xh_2, stride_xd_2, stride_offsets_b_2,
            D, BLOCK_D, BLOCK_H, BLOCK_S, ROWS,
        )  # fmt: skip


def pool_together(
    requests: Sequence[PoolRequest], block_size: int = 128, tiling: Tiling | None = None
) -> list[PooledBlocks]:
    """``draftattn.kernels.pooling.pool_together`` for fp16, bf16 and fp32; reads each tensor once, in any strides."""
    pooled: list[PooledBlocks] = []
    for _, same_head_dim in groupby(requests, key=lambda request: request.x.shape[-1]):
        group = list(same_head_dim)
        for i in range(0, len(group), _TENSORS_PER_LAUNCH):
            pooled += _launch(group[i : i + _TENSORS_PER_LAUNCH], block_size, tiling or Tiling())
    return pooled


def _launch(requests: Sequence[PoolRequest], block_size: int, tiling: Tiling) -> list[PooledBlocks]:
    pooled = [_empty_outputs(request) for request in requests]
    arguments: list[Tensor | int | None] = []
    num_programs = 0
    for request, out in zip(requests, pooled, strict=True):
        batch, num_blocks, heads, head_dim = out.mean.shape
        programs = batch * num_blocks * triton.cdiv(heads, tiling.heads) if out.mean.numel() else 0
        num_programs += programs
        rounded = None if out.rounded is out.mean else out.rounded
        arguments += (request.x, out.mean, rounded, out.maximum, out.mean_square, request.offsets.contiguous())
        arguments += (programs, num_blocks, heads, *request.x.stride())
        arguments.append(num_blocks + 1 if request.offsets.ndim == 2 else 0)
    for _ in range(_TENSORS_PER_LAUNCH - len(requests)):
        arguments += (None,) * 6 + (0,) * 8
    if num_programs == 0:
        return pooled
    block_d, block_s = triton.next_power_of_2(head_dim), triton.next_power_of_2(block_size)
    rows = max(1, min(block_s, tiling.tile // (block_d * tiling.heads)))
    with torch.cuda.device_of(requests[0].x):
        pool_blocks_kernel[(num_programs,)](
            *arguments,
            D=head_dim, BLOCK_D=block_d, BLOCK_H=tiling.heads, BLOCK_S=block_s, ROWS=rows,
            num_warps=tiling.num_warps,
        )  # fmt: skip
    return pooled


def _empty_outputs(request: PoolRequest) -> PooledBlocks:
    x, shape = request.x, output_shape(request)

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    mean = empty(torch.float32)
    return PooledBlocks(
        mean=mean,
        rounded=(mean if x.dtype == torch.float32 else empty(x.dtype)) if request.rounded else None,
        maximum=empty(torch.float32) if request.maximum else None,
        mean_square=empty(torch.float32) if request.mean_square else None,
    )
