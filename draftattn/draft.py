"""The draft: a low-resolution attention map between block means."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_lse import block_lse


def draft_scores(inputs: AttentionInputs, scale: float | None = None, weighted: bool = False) -> Tensor:
    r"""Scores :math:`\bar Q \bar K^\top / \sqrt D` between the mean queries and mean keys of the video blocks.

    Args:
        inputs: the attention call.
        scale: factor of the scores, ``D ** -0.5`` if None.
        weighted: take the weighted mean keys of `AttentionInputs.weighted_means` in place of the plain ones.

    Returns:
        float32 ``[B, H, V, V]`` with ``V`` the number of video blocks.
    """
    video_blocks = inputs.layout.num_video_blocks
    mean_query = inputs.mean_query
    mean_key = inputs.weighted_means(scale).key.to(mean_query.dtype) if weighted else inputs.mean_key
    scale = mean_query.shape[-1] ** -0.5 if scale is None else scale
    # queries become [B, H, V, D], keys [B, H_kv, D, V]
    query = (mean_query[:, :video_blocks] * scale).transpose(1, 2)
    key = mean_key[:, :video_blocks].permute(0, 2, 3, 1)
    group = query.shape[1] // key.shape[1]
    return query @ (key if group == 1 else key.repeat_interleave(group, 1))


def draft_masses(inputs: AttentionInputs, scale: float | None = None) -> Tensor:
    r"""Log of the attention mass that the mean query of every block puts on every video block, but for a constant.

    :math:`\log \sum_{j \in b} \exp(\bar q \cdot k_j / \sqrt D)`: by Jensen's inequality at least the draft score
    :math:`\bar q \cdot \bar k_b / \sqrt D + \log n_b`, and more the more the keys of a block differ. Blocks in which
    few keys matter much, which their mean hides, are found.

    Args:
        inputs: the attention call.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        float32 ``[B, H, V, V]`` with ``V`` the number of video blocks.
    """
    layout = inputs.layout
    video = layout.num_video_blocks
    scale = inputs.query.shape[-1] ** -0.5 if scale is None else scale
    return block_lse(inputs.mean_query[:, :video], inputs.key, layout.offsets[: video + 1], scale, layout.block_size)


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
    return torch.softmax(draft_scores(inputs, scale) + inputs.layout.log_video_block_sizes, dim=-1)
