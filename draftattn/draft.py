"""The draft: a low-resolution attention map between block means."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from draftattn.inputs import AttentionInputs
from draftattn.layout import BlockLayout


def draft_scores(inputs: AttentionInputs, scale: float | None = None) -> Tensor:
    r"""Scores :math:`\bar Q \bar K^\top / \sqrt D` between the mean queries and mean keys of the video blocks.

    Args:
        inputs: the attention call.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        float32 ``[B, H, V, V]`` with ``V`` the number of video blocks.
    """
    video_blocks = inputs.layout.num_video_blocks
    query, key = inputs.mean_query[:, :video_blocks], inputs.mean_key[:, :video_blocks]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = rearrange(query * scale, "b q (h group) d -> b h group q d", h=key.shape[2])
    scores = query @ rearrange(key, "b k h d -> b h 1 d k")
    return rearrange(scores, "b h group q k -> b (h group) q k")


def log_block_sizes(layout: BlockLayout) -> Tensor:
    """Log of the tokens of each video block, float32 ``[V]``: what a key block's score gains by its size."""
    return layout.offsets[: layout.num_video_blocks + 1].diff().float().log()


def draft_map(inputs: AttentionInputs, scale: float | None = None) -> Tensor:
    r"""Softmax attention between the mean queries and mean keys of the video blocks.

    :math:`A = \mathrm{softmax}(\bar Q \bar K^\top / \sqrt D + \log n)` with :math:`n` the tokens of a key block, so
    that an entry estimates the attention mass a query block puts on a key block even where blocks are ragged. Where
    all blocks hold the same number of tokens this is the published draft map (DraftAttention, arXiv 2505.14708,
    section 4).

    Args:
        inputs: the attention call.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        float32 ``[B, H, V, V]`` with ``V`` the number of video blocks; rows sum to 1.
    """
    return torch.softmax(draft_scores(inputs, scale) + log_block_sizes(inputs.layout), dim=-1)
