"""Antidiagonal scores: what a pair of blocks holds, from sums along the antidiagonals of its scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

_CHUNK_SCORES = 2**26


class AntidiagonalGroups(NamedTuple):
    """How the tokens of ragged blocks fall into groups of ``stride``.

    Args:
        tokens: int64 ``[N, G, stride]``, the tokens of each group. In a block whose length is no multiple of the
            stride, evenly spaced tokens fill as many groups as it takes; a block of whole groups is taken as it is.
        size: float32 ``[N, G]``, the tokens that a group stands for; 0 for groups that a block does not have.
    """

    tokens: Tensor
    size: Tensor


def antidiagonal_groups(offsets: Tensor, block_size: int, stride: int) -> AntidiagonalGroups:
    """The groups of blocks of tokens.

    Args:
        offsets: int32 ``[N + 1]``, block boundaries.
        block_size: the most tokens a block holds.
        stride: tokens of a group.

    >>> groups = antidiagonal_groups(torch.tensor([0, 4, 7]), 4, 2)
    >>> groups.tokens.tolist(), groups.size.tolist()
    ([[[0, 1], [2, 3]], [[4, 5], [5, 6]]], [[2.0, 2.0], [1.5, 1.5]])
    """
    lengths = offsets.diff().long()
    count = (lengths + stride - 1) // stride
    slot = torch.arange(-(-block_size // stride) * stride, device=offsets.device).unflatten(0, (-1, stride))
    # the middle of each slot, in whole numbers: exact where a block is whole
    spread = (2 * slot + 1) * lengths[:, None, None] // (2 * stride * count.clamp(min=1))[:, None, None]
    valid = torch.arange(slot.shape[0], device=offsets.device) < count[:, None]
    index = torch.where(valid[..., None], offsets[:-1, None, None].long() + spread, 0)
    size = torch.where(valid, lengths[:, None] / count.clamp(min=1)[:, None], 0.0)
    return AntidiagonalGroups(index, size.float())


def antidiagonal_mass(query: Tensor, key: Tensor, groups: AntidiagonalGroups, *, scale: float | None = None) -> Tensor:
    r"""The share of attention of each query block that each key block holds, estimated along antidiagonals.

    Of every ``stride`` × ``stride`` piece of the score matrix the mean of one antidiagonal is taken, which every one of
    its rows and columns crosses: :math:`s_{ab} = \frac{1}{S} \sum_r q_{a, S-1-r} \cdot k_{b, r}`. Softmax over all
    pieces of a row, summed over a pair of blocks, estimates its mass. It costs :math:`1 / S` of the scores of dense
    attention. Source: XAttention, arXiv 2503.16428, section 3.1; its stride is :math:`S`.

    Args:
        query: ``[B, S_q, H, D]``.
        key: ``[B, S_k, H_kv, D]``.
        groups: of the blocks of both.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        float32 ``[B, H, N, N]``; rows sum to 1. Never waits for the device.

    >>> query, key = torch.randn(2, 1, 7, 1, 4)
    >>> antidiagonal_mass(query, key, antidiagonal_groups(torch.tensor([0, 4, 7]), 4, 2)).shape
    torch.Size([1, 1, 2, 2])
    """
    batch, _, heads, head_dim = query.shape
    num_blocks, per_block, stride = groups.tokens.shape
    scale = head_dim**-0.5 if scale is None else scale
    gathered = query[:, groups.tokens.flip(-1).flatten()].unflatten(1, (-1, stride))
    rows = rearrange(gathered, "b a s (h g) d -> b h g a (s d)", h=key.shape[2])
    gathered = key[:, groups.tokens.flatten()].unflatten(1, (-1, stride))
    columns = rearrange(gathered, "b a s h d -> b h 1 (s d) a")
    bias = groups.size.flatten().log()
    weight = groups.size / groups.size.sum(-1, keepdim=True).clamp(min=1e-12)
    chunk = max(1, _CHUNK_SCORES // max(1, batch * heads * num_blocks * per_block * per_block)) * per_block
    parts = []
    for first in range(0, num_blocks * per_block, chunk):
        scores = (rows[..., first : first + chunk, :] @ columns).float() * (scale / stride) + bias
        shares = scores.softmax(-1).unflatten(-1, (num_blocks, per_block)).sum(-1).unflatten(-2, (-1, per_block))
        blocks = slice(first // per_block, (first + chunk) // per_block)
        parts.append((shares * weight[blocks, :, None]).sum(-2))
    return rearrange(torch.cat(parts, dim=-2), "b h g q k -> b (h g) q k")
