"""Which of several masks serves a head best, tried on a few of its queries."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from draftattn.inputs import AttentionInputs
from draftattn.policies.blocks import tokens_of_blocks

_CHUNK_ELEMENTS = 2**26


def candidate_errors(inputs: AttentionInputs, maps: Tensor, rows: Tensor, scale: float | None = None) -> Tensor:
    """Mean squared error of the attention output of some queries, for every head and candidate mask.

    Each query's output is computed exactly and with the keys of the blocks that each candidate keeps, text among them.
    Never waits for the device. What a query takes from a block is computed once and shared by all candidates.

    Args:
        inputs: the call.
        maps: bool ``[C, V, V]`` over the video blocks; every row must keep a block.
        rows: int64 ``[R]``, the video tokens whose queries are tried.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        float32 ``[B, H, C]``.
    """
    batch, _, heads, head_dim = inputs.query.shape
    kv_heads = inputs.key.shape[2]
    tokens = tokens_of_blocks(inputs.layout)
    query = rearrange(inputs.query[:, rows].float(), "b r (h g) d -> b h (g r) d", h=kv_heads)
    query = query * (head_dim**-0.5 if scale is None else scale)
    candidates = maps[:, tokens.block[rows]].float()
    group = heads // kv_heads
    # keys, values and scores of one head, and what its queries take from each block
    elements = tokens.places.numel() * (2 * head_dim + len(rows) * group) + len(maps[0]) * len(rows) * group * head_dim
    chunk = max(1, _CHUNK_ELEMENTS // max(1, batch * elements))
    errors = [
        _errors_of_heads(inputs, query[:, first : first + chunk], candidates, first)
        for first in range(0, kv_heads, chunk)
    ]
    return torch.cat(errors, dim=1)


def _errors_of_heads(inputs: AttentionInputs, query: Tensor, candidates: Tensor, first: int) -> Tensor:
    """``candidate_errors`` of the query heads of some key heads, from ``first`` on."""
    layout, tokens = inputs.layout, tokens_of_blocks(inputs.layout)
    video, heads = layout.grid.num_tokens, slice(first, first + query.shape[1])
    key, value = (x[:, :, heads] for x in (inputs.key, inputs.value))
    key_blocks, value_blocks = (rearrange(x[:, tokens.places].float(), "b v n h d -> b h v n d") for x in (key, value))
    scores = torch.einsum("bhqd,bhvnd->bhqvn", query, key_blocks).masked_fill(~tokens.valid, -torch.inf)
    text_key, text_value = (rearrange(x[:, video:].float(), "b t h d -> b h t d") for x in (key, value))
    if inputs.text_lengths is not None:
        # padding may hold anything, NaN too
        padding = torch.arange(text_key.shape[2], device=query.device) >= inputs.text_lengths[:, None]
        text_key, text_value = (x.masked_fill(padding[:, None, :, None], 0.0) for x in (text_key, text_value))
    text_scores = query @ text_key.transpose(-1, -2)
    if inputs.text_lengths is not None:
        text_scores = text_scores.masked_fill(padding[:, None, None], -torch.inf)
    largest = scores.flatten(-2).amax(-1)
    if text_scores.shape[-1]:
        largest = torch.maximum(largest, text_scores.amax(-1))
    weights = (scores - largest[..., None, None]).exp()
    text_weights = (text_scores - largest[..., None]).exp()
    # what each query takes from each block, not yet divided by the sum of its weights
    taken = torch.einsum("bhqvn,bhvnd->bhqvd", weights, value_blocks).unflatten(2, (-1, candidates.shape[1]))
    shares = weights.sum(-1).unflatten(2, (-1, candidates.shape[1]))
    text_taken = (text_weights @ text_value).unflatten(2, (-1, candidates.shape[1]))
    text_shares = text_weights.sum(-1).unflatten(2, (-1, candidates.shape[1]))

    def output(kept: Tensor) -> Tensor:
        """The queries' output over the kept blocks, ``kept`` ``[C, R, V]``: ``[C, B, h, g, R, D]``."""
        total = torch.einsum("crv,bhgrvd->cbhgrd", kept, taken) + text_taken
        # weights may all underflow where a mask misses what a query looks at
        return total / (torch.einsum("crv,bhgrv->cbhgr", kept, shares) + text_shares)[..., None].clamp(min=1e-30)

    difference = output(candidates) - output(torch.ones_like(candidates[:1]))
    return rearrange(difference.square().mean((-1, -2)), "c b h g -> b (h g) c")
