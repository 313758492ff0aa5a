"""The log-sum-exp of every block of keys, for a few queries."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.dispatch import triton_serves

_CHUNK_SCORES = 2**24  # alive at once on a CPU


def block_lse(query: Tensor, key: Tensor, offsets: Tensor, scale: float, block_size: int = 128) -> Tensor:
    r"""For every query and block of keys :math:`\log \sum_{j \in b} \exp(\text{scale}\; q \cdot k_j)`.

    Of a block's mean query this is the mass that it puts on every block, up to a constant of the row. Reads every key
    once for some queries, and no values. Never waits for the device; gives no gradients.

    Args:
        query: ``[B, Q, H, D]``, taken in the dtype of the keys.
        key: ``[B, S, H_kv, D]``, any strides with a contiguous last dimension; ``H`` must be a multiple of ``H_kv``.
        offsets: int32 ``[N + 1]`` or ``[B, N + 1]``, ascending block boundaries within ``S``.
        scale: factor of the scores.
        block_size: the most tokens any block holds.

    Returns:
        float32 ``[B, H, Q, N]``; ``-inf`` for blocks without tokens.

    Raises:
        ValueError: if the shapes do not fit together.

    >>> key = torch.tensor([1.0, 3.0, 2.0]).log().view(1, 3, 1, 1)
    >>> lse = block_lse(torch.ones(1, 1, 1, 1), key, torch.tensor([0, 2, 3], dtype=torch.int32), scale=1.0)
    >>> lse.exp().round(decimals=3).flatten().tolist()
    [4.0, 2.0]
    """
    if query.ndim != 4 or key.ndim != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must be [batch, tokens, heads, head_dim]"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads cannot share {key.shape[2]} key heads evenly")
    if offsets.ndim not in (1, 2) or (offsets.ndim == 2 and offsets.shape[0] != key.shape[0]):
        raise ValueError(f"offsets must be [N + 1] or [{key.shape[0]}, N + 1]; got shape {list(offsets.shape)}")
    query, key = query.detach(), key.detach()
    if not triton_serves(key) or key.dtype == torch.float64:
        return block_lse_reference(query, key, offsets, scale)
    if torch.compiler.is_compiling():
        return _block_lse_op(query, key, offsets, scale, block_size)
    from draftattn.kernels.triton_block_lse import block_lse as block_lse_triton

    return block_lse_triton(query, key, offsets, scale, block_size)


def block_lse_reference(query: Tensor, key: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """``block_lse`` in plain torch, and what serves it on a CPU; some heads at a time."""
    batch, num_queries, heads, _ = query.shape
    length, kv_heads = key.shape[1:3]
    num_blocks = offsets.shape[-1] - 1
    dtype = torch.promote_types(key.dtype, torch.float32)
    offsets = torch.atleast_2d(offsets).expand(batch, -1).contiguous()
    token = torch.arange(length, device=key.device, dtype=offsets.dtype).expand(batch, -1).contiguous()
    block = torch.searchsorted(offsets, token, right=True) - 1
    # a spare last block stands for tokens outside every block, which may hold anything
    block = torch.where(block < 0, num_blocks, block)
    queries = query.to(key.dtype).to(dtype).transpose(1, 2).unflatten(1, (kv_heads, -1))
    keys = key.to(dtype).transpose(1, 2).masked_fill((block == num_blocks)[:, None, :, None], 0.0)
    heads_at_once = max(1, _CHUNK_SCORES // max(1, batch * num_queries * length * (heads // kv_heads)))
    parts = []
    for first in range(0, kv_heads, heads_at_once):
        part = slice(first, first + heads_at_once)
        # scores of some heads, [B, H, Q, S]
        scores = (queries[:, part] @ keys[:, part, None].transpose(-1, -2)).flatten(1, 2) * scale
        index = block[:, None, None].expand(scores.shape)
        largest = scores.new_full((*scores.shape[:3], num_blocks + 1), -torch.inf)
        largest = largest.scatter_reduce_(-1, index, scores, "amax")
        weights = (scores - largest.gather(-1, index)).exp()
        sums = torch.zeros_like(largest).scatter_add_(-1, index, weights)
        parts.append((largest + sums.log())[..., :-1])
    return torch.cat(parts, dim=1).float()


@torch.library.custom_op("draftattn::block_lse", mutates_args=())
def _block_lse_op(query: Tensor, key: Tensor, offsets: Tensor, scale: float, block_size: int) -> Tensor:
    from draftattn.kernels.triton_block_lse import block_lse as block_lse_triton

    return block_lse_triton(query, key, offsets, scale, block_size)


@_block_lse_op.register_fake
def _(query: Tensor, key: Tensor, offsets: Tensor, scale: float, block_size: int) -> Tensor:
    del key, scale, block_size
    batch, num_queries, heads, _ = query.shape
    return query.new_empty((batch, heads, num_queries, offsets.shape[-1] - 1), dtype=torch.float32)
