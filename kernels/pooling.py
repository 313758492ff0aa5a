"""Means over ragged blocks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.backends import triton_version


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
    if x.ndim != 4:
        raise ValueError(f"x must be [batch, tokens, heads, head_dim]; got shape {list(x.shape)}")
    if offsets.ndim not in (1, 2) or (offsets.ndim == 2 and offsets.shape[0] != x.shape[0]):
        raise ValueError(f"offsets must be [N + 1] or [{x.shape[0]}, N + 1]; got shape {list(offsets.shape)}")
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    if x.is_cuda and x.dtype != torch.float64 and not wants_gradient and triton_version() is not None:
        from draftattn.kernels.triton_pooling import pool_blocks as pool_blocks_triton

        return pool_blocks_triton(x, offsets, block_size)
    return pool_blocks_reference(x, offsets)


def pool_blocks_reference(x: Tensor, offsets: Tensor) -> Tensor:
    """``pool_blocks`` in plain torch, and what serves it on a CPU."""
    batch, length, heads, head_dim = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Tokens before the first block and after the last one form two more bags, dropped below.
    starts = torch.nn.functional.pad(torch.atleast_2d(offsets).expand(batch, -1), (1, 0))
    starts = starts + torch.arange(batch, dtype=starts.dtype, device=x.device)[:, None] * length
    # Of torch's segment sums this is the fastest on a CPU (segment_reduce is 10 times slower), and deterministic.
    sums = torch.nn.functional.embedding_bag(
        torch.arange(batch * length, dtype=starts.dtype, device=x.device),
        x.to(dtype).reshape(batch * length, heads * head_dim),
        starts.flatten(),
        mode="sum",
    )
    counts = offsets.diff(dim=-1).clamp(min=1)[..., None, None]
    return sums.view(batch, -1, heads, head_dim)[:, 1:-1] / counts
