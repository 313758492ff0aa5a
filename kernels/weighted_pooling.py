"""Means of the keys and values of blocks, weighted by what a query would give each token."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.dispatch import triton_serves
from draftattn.kernels.pooling import reduce_blocks


def pool_weighted(
    key: Tensor, value: Tensor, direction: Tensor, offsets: Tensor, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    r"""Means over the tokens of each block, weighted by their softmax along a direction.

    .. math:: \bar k_b = \sum_{j \in b} w_j k_j, \quad \bar v_b = \sum_{j \in b} w_j v_j, \quad
              w_j = \frac{e^{d \cdot k_j}}{\sum_{i \in b} e^{d \cdot k_i}}

    With :math:`d` zero these are plain means. Never waits for the device; differentiable.

    Args:
        key: ``[B, S, H_kv, D]``, any strides.
        value: the same shape and dtype.
        direction: ``[B, H_kv, D]``: a query of each item and key head, times the scale of the scores.
        offsets: int32 ``[N + 1]`` or ``[B, N + 1]``, ascending block boundaries within ``S``.
        block_size: the most tokens any block holds.

    Returns:
        Mean keys and mean values, ``[B, N, H_kv, D]`` in the dtype of the keys; blocks without tokens give zeros.

    Raises:
        ValueError: if the shapes do not fit together.

    >>> key = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)
    >>> offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> mean_key, mean_value = pool_weighted(key, 10 * key, torch.full((1, 1, 1), 3.0).log(), offsets)
    >>> [round(x, 4) for x in (*mean_key.flatten().tolist(), *mean_value.flatten().tolist())]
    [0.75, 2.0, 7.5, 20.0]
    """
    _check(key, value, direction, offsets)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (key, value, direction))
    if not triton_serves(key) or key.dtype == torch.float64 or wants_gradient:
        return pool_weighted_reference(key, value, direction, offsets)
    if torch.compiler.is_compiling():
        mean_key, mean_value = _pool_weighted_op(key, value, direction, offsets, block_size)
        return mean_key, mean_value
    from draftattn.kernels.triton_weighted_pooling import pool_weighted as pool_weighted_triton

    return pool_weighted_triton(key, value, direction, offsets, block_size)


def pool_weighted_reference(key: Tensor, value: Tensor, direction: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """``pool_weighted`` in plain torch, and what serves it on a CPU."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    keys, values = key.to(dtype), value.to(dtype)
    scores = (keys * direction.to(dtype)[:, None]).sum(-1, keepdim=True)
    # [B, S]; tokens outside every block meet no sum, and any block's largest score will do for them
    offsets_of_items = torch.atleast_2d(offsets).expand(key.shape[0], -1).contiguous()
    token = torch.arange(key.shape[1], device=key.device, dtype=offsets.dtype).expand(key.shape[0], -1).contiguous()
    block = (torch.searchsorted(offsets_of_items, token, right=True) - 1).clamp(0, offsets.shape[-1] - 2)
    largest = reduce_blocks(scores.detach(), offsets, "max")
    largest = largest.gather(1, block[..., None, None].expand(*scores.shape[:3], 1))
    weights = (scores - largest).exp()
    sums = reduce_blocks(weights, offsets, "sum")
    sums = torch.where(sums == 0, 1.0, sums)
    mean_key, mean_value = (reduce_blocks(weights * x, offsets, "sum") / sums for x in (keys, values))
    return mean_key.to(key.dtype), mean_value.to(key.dtype)


def _check(key: Tensor, value: Tensor, direction: Tensor, offsets: Tensor) -> None:
    if key.ndim != 4 or key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(
            f"key and value must be [batch, tokens, heads, head_dim] of one shape and dtype; got {list(key.shape)} "
            f"{key.dtype} and {list(value.shape)} {value.dtype}"
        )
    batch, _, heads, head_dim = key.shape
    if tuple(direction.shape) != (batch, heads, head_dim):
        raise ValueError(f"direction must be {[batch, heads, head_dim]}; got shape {list(direction.shape)}")
    if offsets.ndim not in (1, 2) or offsets.shape[-1] < 2 or (offsets.ndim == 2 and offsets.shape[0] != batch):
        raise ValueError(f"offsets must be [N + 1] or [{batch}, N + 1]; got shape {list(offsets.shape)}")


@torch.library.custom_op("draftattn::pool_weighted", mutates_args=())
def _pool_weighted_op(
    key: Tensor, value: Tensor, direction: Tensor, offsets: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    from draftattn.kernels.triton_weighted_pooling import pool_weighted as pool_weighted_triton

    return pool_weighted_triton(key, value, direction, offsets, block_size)


@_pool_weighted_op.register_fake
def _(key: Tensor, value: Tensor, direction: Tensor, offsets: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    del value, direction, block_size
    shape = (key.shape[0], offsets.shape[-1] - 1, *key.shape[2:])
    return key.new_empty(shape), key.new_empty(shape)
