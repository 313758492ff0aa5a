"""Block-sparse attention in plain torch: the oracle every other backend is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from draftattn.kernels.api import BlockMeans
    from draftattn.kernels.block_mask import BlockMask


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
    """Masked dense attention in float32, or float64 for float64 inputs; differentiable. Memory grows with S_q · S_k.

    See ``draftattn.kernels.api.block_sparse_attention`` for the arguments.
    """
    batch, query_length, heads, _ = query.shape
    key_length = key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = heads // key.shape[2]

    def per_query_head(x: Tensor) -> Tensor:
        return x.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1)

    query_block = _block_of_token(block_mask.query_offsets[None], query_length).expand(batch, -1)
    key_block = _block_of_token(torch.atleast_2d(block_mask.key_offsets), key_length).expand(batch, -1)

    # Tokens outside every block may hold anything, NaN too, and 0 * NaN would spread it, in gradients as well.
    outside = (key_block == block_mask.num_key_blocks)[:, None, :, None]
    keys, values = (per_query_head(x).masked_fill(outside, 0.0) for x in (key, value))
    outside = (query_block == block_mask.num_query_blocks)[:, None, :, None]
    queries = query.to(dtype).transpose(1, 2).masked_fill(outside, 0.0)

    def of_queries(block_map: Tensor) -> Tensor:
        """The row of the block map that each query is in, ``[B, H, S_q, K + 1]``."""
        # A spare last row and column, never allowed, stand for tokens outside every block.
        block_map = torch.nn.functional.pad(block_map, (0, 1, 0, 1))
        block_map = block_map.repeat_interleave(heads // block_map.shape[1], dim=1).expand(batch, -1, -1, -1)
        return block_map.gather(2, query_block[:, None, :, None].expand(-1, heads, -1, block_map.shape[-1]))

    # [B, H, S_q, S_k], the block of each key
    column = key_block[:, None, None].expand(-1, heads, query_length, -1)
    chosen = of_queries(block_mask.block_map)
    allowed = chosen.gather(-1, column)

    # [B, 1, S_q, 1], where queries stand among the keys
    position = _position_of_query(block_mask, query_block, key_length - query_length)[:, None, :, None]
    key_index = torch.arange(key_length, device=query.device)
    if causal:
        allowed = allowed & (key_index <= position)
    if block_mask.window is not None:
        window = block_mask.window
        whole = of_queries(block_mask.whole_map).gather(-1, column)
        starts = block_mask.key_offsets[..., :1] if window.starts is None else window.starts
        starts = _of_block(starts.expand(*starts.shape[:-1], block_mask.num_query_blocks), query_block)
        sinks = key_index < starts[:, None, :, None] + window.sink
        allowed = allowed & (whole | sinks | (key_index > position - window.size))
    bias = torch.zeros(allowed.shape, dtype=dtype, device=query.device).masked_fill(~allowed, -torch.inf)

    if residual is not None:
        offsets = torch.atleast_2d(block_mask.key_offsets).expand(batch, -1)
        skipped = ~chosen[..., :-1]
        skipped &= (query_block < block_mask.num_query_blocks)[:, None, :, None]
        if causal:
            skipped = skipped & (offsets[:, None, None, 1:] <= position + 1)
        log_count = offsets.diff(dim=-1).to(dtype).log()[:, None, None, :]
        mean_bias = torch.where(skipped, log_count, -torch.inf)
        keys = torch.cat([keys, per_query_head(residual.key)], dim=2)
        values = torch.cat([values, per_query_head(residual.value)], dim=2)
        bias = torch.cat([bias, mean_bias], dim=-1)

    # A row that sees nothing would divide 0 by 0, in the gradient too: its scores become 0 and its weights are dropped.
    sees_nothing = (bias == -torch.inf).all(-1, keepdim=True)
    scores = queries @ keys.transpose(-1, -2) * scale + bias.masked_fill(sees_nothing, 0.0)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp().masked_fill(sees_nothing, 0.0)
    output = (weights @ values).transpose(1, 2).to(query.dtype)
    return output, lse.masked_fill(sees_nothing, -torch.inf)[..., 0].float() if return_lse else None


def _block_of_token(offsets: Tensor, length: int) -> Tensor:
    """The block id of each token, ``[B, length]``; the number of blocks where a token is in none."""
    token = torch.arange(length, device=offsets.device, dtype=offsets.dtype).expand(offsets.shape[0], -1)
    block = torch.searchsorted(offsets.contiguous(), token.contiguous(), right=True) - 1
    return torch.where(block < 0, offsets.shape[1] - 1, block)


def _of_block(per_block: Tensor, block: Tensor) -> Tensor:
    """Values ``[Q]`` or ``[B, Q]`` of the blocks ``[B, S]`` that tokens are in; 0 for tokens outside every block."""
    per_block = torch.nn.functional.pad(torch.atleast_2d(per_block), (0, 1)).expand(block.shape[0], -1)
    return per_block.gather(-1, block)


def _position_of_query(block_mask: BlockMask, query_block: Tensor, default_shift: int) -> Tensor:
    """Where each query stands among the keys, ``[B, S_q]``."""
    index = torch.arange(query_block.shape[1], device=query_block.device)
    if block_mask.query_shifts is None:
        return (index + default_shift).expand(query_block.shape)
    return index + _of_block(block_mask.query_shifts, query_block)
