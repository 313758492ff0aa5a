"""Statistics of ragged blocks of tokens: means, and on request maxima and mean squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from draftattn.kernels.dispatch import triton_serves


class PoolRequest(NamedTuple):
    """A tensor to pool, and what to make besides its block means.

    Args:
        x: ``[B, S, H, D]``, any strides.
        offsets: int32 ``[N + 1]`` or ``[B, N + 1]``, ascending block boundaries within ``S``.
        rounded: also the means in the dtype of ``x``.
        maximum: also the largest value of each channel.
        mean_square: also the mean of the squares of each channel.
    """

    x: Tensor
    offsets: Tensor
    rounded: bool = False
    maximum: bool = False
    mean_square: bool = False


class PooledBlocks(NamedTuple):
    """Statistics of the blocks of a tensor, each ``[B, N, H, D]``; None where not asked for.

    ``rounded`` has the dtype of the tensor, the others are float32 (float64 for float64 tensors). Blocks without
    tokens give zeros.
    """

    mean: Tensor
    rounded: Tensor | None = None
    maximum: Tensor | None = None
    mean_square: Tensor | None = None


def pool_blocks(x: Tensor, offsets: Tensor, block_size: int = 128) -> Tensor:
    """Mean over the tokens of each block. Never waits for the device; differentiable.

    Args:
        x: ``[B, S, H, D]``, any strides.
        offsets: int32 ``[N + 1]`` or ``[B, N + 1]``, ascending block boundaries within ``S``.
        block_size: the most tokens any block holds.

    Returns:
        float32 ``[B, N, H, D]`` (float64 for float64 inputs); blocks without tokens give zeros.

    Raises:
        ValueError: if the shapes do not fit together.

    >>> pool_blocks(torch.arange(6.0).view(1, 6, 1, 1), torch.tensor([0, 4, 6], dtype=torch.int32)).flatten().tolist()
    [1.5, 4.5]
    """
    return pool_together([PoolRequest(x, offsets)], block_size)[0].mean


def pool_together(requests: Sequence[PoolRequest], block_size: int = 128) -> list[PooledBlocks]:
    """Pools several tensors, on a GPU up to three in one launch. Never waits for the device; differentiable.

    Args:
        requests: the tensors, on one device, and what to make of each.
        block_size: the most tokens any block holds.

    Returns:
        One result per request.

    Raises:
        ValueError: if the shapes do not fit together.

    >>> x, offsets = torch.tensor([1.0, -3.0, 5.0]).view(1, 3, 1, 1), torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> (pooled,) = pool_together([PoolRequest(x, offsets, maximum=True, mean_square=True)])
    >>> pooled.mean.flatten().tolist(), pooled.maximum.flatten().tolist(), pooled.mean_square.flatten().tolist()
    ([-1.0, 5.0], [1.0, 5.0], [5.0, 25.0])
    """
    for request in requests:
        _check(request.x, request.offsets)
    if not all(_kernel_serves(request.x) for request in requests):
        return [pool_reference(request) for request in requests]
    if torch.compiler.is_compiling():
        tensors, offsets = [request.x for request in requests], [request.offsets for request in requests]
        wanted = [[request[i] for request in requests] for i in range(2, len(PoolRequest._fields))]
        return _unflatten(requests, _pool_blocks_op(tensors, offsets, block_size, *wanted))
    from draftattn.kernels.triton_pooling import pool_together as pool_together_triton

    return pool_together_triton(requests, block_size)


def pool_reference(request: PoolRequest) -> PooledBlocks:
    """``pool_together`` for one tensor in plain torch, and what serves it on a CPU."""
    x, offsets = request.x, request.offsets
    mean = pool_blocks_reference(x, offsets)
    square = x.to(mean.dtype).square() if request.mean_square else None
    return PooledBlocks(
        mean=mean,
        rounded=mean.to(x.dtype) if request.rounded else None,
        maximum=reduce_blocks(x, offsets, "max") if request.maximum else None,
        mean_square=None if square is None else pool_blocks_reference(square, offsets),
    )


def pool_blocks_reference(x: Tensor, offsets: Tensor) -> Tensor:
    """``pool_blocks`` in plain torch."""
    return reduce_blocks(x, offsets, "sum") / offsets.diff(dim=-1).clamp(min=1)[..., None, None]


def reduce_blocks(x: Tensor, offsets: Tensor, mode: Literal["sum", "max"]) -> Tensor:
    """Sums or maxima of blocks in plain torch, ``[B, N, H, D]`` in at least float32; zeros for empty blocks."""
    batch, length, heads, head_dim = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Tokens before the first block and after the last one form two more bags, dropped below.
    starts = torch.nn.functional.pad(torch.atleast_2d(offsets).expand(batch, -1), (1, 0))
    starts = starts + torch.arange(batch, dtype=starts.dtype, device=x.device)[:, None] * length
    # Of torch's segment sums this is the fastest on a CPU (segment_reduce is 10 times slower), and deterministic.
    reduced = torch.nn.functional.embedding_bag(
        torch.arange(batch * length, dtype=starts.dtype, device=x.device),
        x.to(dtype).reshape(batch * length, heads * head_dim),
        starts.flatten(),
        mode=mode,
    )
    return reduced.view(batch, offsets.shape[-1] + 1, heads, head_dim)[:, 1:-1]


def output_shape(request: PoolRequest) -> tuple[int, int, int, int]:
    """``(B, N, H, D)`` of a request."""
    batch, _, heads, head_dim = request.x.shape
    return batch, request.offsets.shape[-1] - 1, heads, head_dim


def _check(x: Tensor, offsets: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be [batch, tokens, heads, head_dim]; got shape {list(x.shape)}")
    if offsets.ndim not in (1, 2) or (offsets.ndim == 2 and offsets.shape[0] != x.shape[0]):
        raise ValueError(f"offsets must be [N + 1] or [{x.shape[0]}, N + 1]; got shape {list(offsets.shape)}")


def _kernel_serves(x: Tensor) -> bool:
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    return triton_serves(x) and x.dtype != torch.float64 and not wants_gradient


def _flatten(pooled: Sequence[PooledBlocks]) -> list[Tensor]:
    # outputs of an operator may not be one tensor twice
    return [x for result in pooled for i, x in enumerate(result) if x is not None and not (i and x is result.mean)]


def _unflatten(requests: Sequence[PoolRequest], tensors: list[Tensor]) -> list[PooledBlocks]:
    remaining = iter(tensors)
    pooled = []
    for x, _, rounded, maximum, mean_square in requests:
        mean = next(remaining)
        rounded_mean = (mean if x.dtype == mean.dtype else next(remaining)) if rounded else None
        others = [next(remaining) if wanted else None for wanted in (maximum, mean_square)]
        pooled.append(PooledBlocks(mean, rounded_mean, *others))
    return pooled


_SCHEMA = "(Tensor[] tensors, Tensor[] offsets, int block_size, bool[] rounded, bool[] maximum, bool[] square)"


@torch.library.custom_op("draftattn::pool_blocks", mutates_args=(), schema=f"{_SCHEMA} -> Tensor[]")
def _pool_blocks_op(
    tensors: list[Tensor],
    offsets: list[Tensor],
    block_size: int,
    rounded: list[bool],
    maximum: list[bool],
    square: list[bool],
) -> list[Tensor]:
    from draftattn.kernels.triton_pooling import pool_together as pool_together_triton

    requests = [PoolRequest(*columns) for columns in zip(tensors, offsets, rounded, maximum, square, strict=True)]
    return _flatten(pool_together_triton(requests, block_size))


@_pool_blocks_op.register_fake
def _(
    tensors: list[Tensor],
    offsets: list[Tensor],
    block_size: int,
    rounded: list[bool],
    maximum: list[bool],
    square: list[bool],
) -> list[Tensor]:
    del block_size
    made: list[Tensor] = []
    for x, offsets_of, *wanted in zip(tensors, offsets, rounded, maximum, square, strict=True):
        shape = output_shape(PoolRequest(x, offsets_of))
        made.append(x.new_empty(shape, dtype=torch.float32))
        # rounded means of float32 are the means
        dtypes = (x.dtype, torch.float32, torch.float32)
        kept = (wanted[0] and x.dtype != torch.float32, *wanted[1:])
        made += [x.new_empty(shape, dtype=dtype) for dtype, made_too in zip(dtypes, kept, strict=True) if made_too]
    return made
