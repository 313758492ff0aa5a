"""The attention that pairs of blocks hold in a causal sequence, estimated along antidiagonals of the scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from draftattn.kernels.backends import TRITON_DTYPES
from draftattn.kernels.dispatch import triton_serves

_CHUNK_SCORES = 2**26  # alive at once


def antidiagonal_mass(
    query: Tensor, key: Tensor, block_size: int, stride: int, *, scale: float | None = None
) -> Tensor:
    r"""Estimated attention of block pairs; the last query stands at the last key, and blocks begin at key 0.

    Tokens fall into groups of ``stride``. Of each pair of groups the mean of an antidiagonal,
    :math:`s_{ab} = \frac{1}{S} \sum_r q_{a, S-1-r} \cdot k_{b, r}`, stands for all its scores; a softmax over the
    groups up to a query group's own, summed per pair of blocks, is the result. Tokens past the end and before the first
    query count as zeros in their group. Source: XAttention, arXiv 2503.16428. Not differentiable; never waits for the
    device.

    Args:
        query: ``[B, N, H, D]``, ``N`` at most the number of keys.
        key: ``[B, K, H_kv, D]``; ``H`` must be a multiple of ``H_kv``.
        block_size: tokens of a block.
        stride: tokens of a group; divides ``block_size``.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        float32 ``[B, H, Q_blocks, K_blocks]``. Query blocks are cut where key blocks are, from the block of the first
        query on; a row of full blocks sums to ``block_size / stride``.

    Raises:
        ValueError: if shapes or sizes do not fit together.

    >>> antidiagonal_mass(torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8), block_size=2, stride=2).tolist()
    [[[[1.0, 0.0], [0.5, 0.5]]]]
    """
    for name, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim]; got shape {list(tensor.shape)}")
    fits = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and query.shape[2] % key.shape[2] == 0
    if not fits or query.shape[1] > key.shape[1]:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} do not fit together")
    if not 1 <= stride <= block_size or block_size % stride:
        raise ValueError(f"stride is {stride}; it must divide the block size {block_size}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key = query.detach(), key.detach()
    if not _kernel_serves(query, block_size):
        return antidiagonal_mass_reference(query, key, block_size, stride, scale)
    from draftattn.kernels import triton_antidiagonal_mass

    return triton_antidiagonal_mass.antidiagonal_mass(query, key, block_size, stride, scale)


def antidiagonal_mass_reference(query: Tensor, key: Tensor, block_size: int, stride: int, scale: float) -> Tensor:
    """``antidiagonal_mass`` in plain torch, some query groups at a time."""
    batch, num_queries, heads, _ = query.shape
    num_keys, kv_heads = key.shape[1:3]
    per_block = block_size // stride
    first_block, front = divmod(num_keys - num_queries, block_size)
    rows, columns = -(-(front + num_queries) // block_size), -(-num_keys // block_size)
    # queries begin at the boundary of their first block, so that groups fall on the same tokens as those of the keys
    query = F.pad(query, (0, 0, 0, 0, front, rows * block_size - front - num_queries))
    key = F.pad(key, (0, 0, 0, 0, 0, columns * block_size - num_keys))
    # [B * H_kv, groups * group, stride * D]: the query heads of a group are rows of one product
    query = query.unflatten(2, (kv_heads, -1)).unflatten(1, (-1, stride)).permute(0, 3, 1, 4, 2, 5)
    query = query.flatten(4).flatten(2, 3).flatten(0, 1)
    # a query's partner on the antidiagonal is the key from the other end
    key = key.unflatten(1, (-1, stride)).flip(2).permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
    group = heads // kv_heads
    num_groups, num_key_groups = rows * per_block, columns * per_block
    key_group = torch.arange(num_key_groups, device=key.device)
    first_real, last_real = front // stride, (num_keys - 1) // stride
    chunk = max(1, _CHUNK_SCORES // max(1, batch * heads * num_key_groups * per_block)) * per_block
    out = torch.zeros(batch * kv_heads, rows, group, columns, dtype=torch.float32, device=query.device)
    for start in range(0, num_groups, chunk):
        stop = min(start + chunk, num_groups)
        # later key groups are hidden from all rows of this part
        end = min(num_key_groups, stop + first_block * per_block)
        scores = query[:, start * group : stop * group] @ key[:, :end].transpose(-1, -2)
        scores = scores.float().unflatten(1, (-1, group)) * (scale / stride)
        position = torch.arange(start, stop, device=key.device) + first_block * per_block
        hidden = key_group[:end] > position[:, None]
        unreal = (position < first_real + first_block * per_block) | (position > last_real)
        shares = scores.masked_fill_(hidden[:, None], -torch.inf).softmax(-1)
        shares = shares.masked_fill_(unreal[:, None, None], 0.0)
        sums = shares.unflatten(-1, (-1, per_block)).sum(-1).unflatten(1, (-1, per_block)).sum(2)
        out[:, start // per_block : stop // per_block, :, : end // per_block] = sums
    return out.transpose(1, 2).unflatten(0, (batch, kv_heads)).flatten(1, 2)


def _kernel_serves(query: Tensor, block_size: int) -> bool:
    return triton_serves(query) and query.dtype in TRITON_DTYPES and block_size <= 128
