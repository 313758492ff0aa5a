"""The log-sum-exp of every block of keys in two parts, of which each lies in one band of distances."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from draftattn.kernels.backends import TRITON_DTYPES, TRITON_HEAD_DIMS
from draftattn.kernels.dispatch import triton_serves

_CHUNK_SCORES = 2**26  # alive at once


def split_block_lse(query: Tensor, key: Tensor, block_size: int, *, scale: float | None = None) -> Tensor:
    r"""Causal :math:`\log \sum_j \exp(\text{scale}\; q \cdot k_j)` over two parts of every block of keys.

    Let a query stand at place ``c`` of block ``a``. The first part of block ``b`` are its keys up to place ``c``, the
    second part those behind it: the distances of the first lie in ``(a - b) * block_size`` to
    ``(a - b + 1) * block_size - 1``, those of the second in the band of distances before. So sums of whole parts give
    attention by blocks of keys and by bands of distances at once. Blocks begin at key 0, and the last query stands at
    the last key. Reads every key once for some queries, and no values. Not differentiable; never waits for the device.

    Args:
        query: ``[B, R, H, D]``, ``R`` at most the number of keys.
        key: ``[B, K, H_kv, D]``; ``H`` must be a multiple of ``H_kv``.
        block_size: tokens of a block, 1 to 128.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        float32 ``[B, H, R, 2, K_blocks]``; ``-inf`` for parts that hold no key in a query's past, and on a GPU for
        those that vanish in float32 beside the block's other part.

    Raises:
        ValueError: if shapes or sizes do not fit together.

    >>> query, key = torch.zeros(1, 2, 1, 4), torch.zeros(1, 6, 1, 4)
    >>> split_block_lse(query, key, 4)[0, 0].exp().round().tolist()
    [[[1.0, 1.0], [3.0, 0.0]], [[2.0, 2.0], [2.0, 0.0]]]
    """
    for name, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim]; got shape {list(tensor.shape)}")
    fits = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and query.shape[2] % key.shape[2] == 0
    if not fits or query.shape[1] > key.shape[1]:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} do not fit together")
    if not 1 <= block_size <= 128:
        raise ValueError(f"block_size is {block_size}; a block holds 1 to 128 tokens")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key = query.detach(), key.detach()
    if not _kernel_serves(query, key):
        return split_block_lse_reference(query, key, block_size, scale)
    from draftattn.kernels import triton_split_block_lse

    return triton_split_block_lse.split_block_lse(query, key, block_size, scale)


def split_block_lse_reference(query: Tensor, key: Tensor, block_size: int, scale: float) -> Tensor:
    """``split_block_lse`` in plain torch, some key heads at a time."""
    batch, num_queries, heads, _ = query.shape
    num_keys, kv_heads = key.shape[1:3]
    columns = -(-num_keys // block_size)
    token = torch.arange(num_keys, device=key.device)
    position = token[num_keys - num_queries :, None]
    hidden = token > position
    behind = torch.arange(block_size, device=key.device) > position[..., None] % block_size
    out = torch.empty(batch, heads, num_queries, 2, columns, dtype=torch.float32, device=query.device)
    group = heads // kv_heads
    at_once = max(1, _CHUNK_SCORES // max(1, batch * group * num_queries * num_keys))
    for first in range(0, kv_heads, at_once):
        part = slice(first, first + at_once)
        queries = query.unflatten(2, (kv_heads, group))[:, :, part]
        scores = torch.einsum("bqhgd,bkhd->bhgqk", queries, key[:, :, part]).float() * scale
        scores = F.pad(scores.masked_fill_(hidden, -torch.inf), (0, columns * block_size - num_keys), value=-torch.inf)
        blocks = scores.flatten(1, 2).unflatten(-1, (columns, block_size))
        lse = [blocks.masked_fill(left_out, -torch.inf).logsumexp(-1) for left_out in (behind, ~behind)]
        out[:, first * group : (first + at_once) * group] = torch.stack(lse, dim=-2)
    return out


def _kernel_serves(query: Tensor, key: Tensor) -> bool:
    serves = triton_serves(query) and query.dtype in TRITON_DTYPES and query.shape[3] in TRITON_HEAD_DIMS
    return serves and query.shape[2] // key.shape[2] <= 128
