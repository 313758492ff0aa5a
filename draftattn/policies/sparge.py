"""SpargeAttn: trust block means only where a block's tokens are alike, and keep a share of the draft map's mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from draftattn.config import DraftConfig
from draftattn.draft import draft_scores
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.pooling import pool_blocks
from draftattn.layout import BlockLayout
from draftattn.policies.blocks import mask_of, pool_for_draft, with_dense_text
from draftattn.policy import CallContext


@dataclass(frozen=True)
class SpargeConfig:
    r"""The first stage of SpargeAttn (arXiv 2502.18137, section 3.3): which blocks are computed at all.

    A block's *self-similarity* is the mean cosine similarity between its tokens, that is
    :math:`\lVert \mathrm{mean}_i\, x_i / \lVert x_i \rVert \rVert^2`; keys are taken relative to the mean of all keys,
    as SpargeAttn smooths them. Key blocks that do not exceed ``similarity`` are kept by everyone and left out of the
    draft map; such query blocks attend to everything. Every other row keeps its best blocks of the draft map, as long
    as their sum is at most ``mass``, one at least. The second stage, which skips products inside a kernel, is no mask
    and not here; neither is quantisation. The paper tunes both values for every layer; here one pair serves all.

    Args:
        mass: share of the draft map that the kept blocks may hold, in (0, 1]; it sets the density, `sparsity` of
            `DraftConfig` does not.
        similarity: blocks less similar to themselves are not judged by their mean, in [-1, 1]; -1 judges all.
    """

    name: ClassVar[str] = "sparge"
    matched_by: ClassVar[str] = "mass"

    mass: float = 0.9
    similarity: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise InputError(f"mass of policy 'sparge' is {self.mass!r}; it must be in (0, 1]")
        if not -1 <= self.similarity <= 1:
            raise InputError(f"similarity of policy 'sparge' is {self.similarity!r}; it must be in [-1, 1]")

    def make(self, config: DraftConfig) -> SpargePolicy:
        """The policy."""
        return SpargePolicy(config, self)


@dataclass(frozen=True)
class SpargePolicy:
    """See `SpargeConfig`."""

    config: DraftConfig
    settings: SpargeConfig

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.policy.MaskPolicy`."""
        del context
        pool_for_draft(self.config, inputs)
        layout, similarity = inputs.layout, self.settings.similarity
        video = layout.grid.num_tokens
        key = inputs.key[:, :video]
        alike_query = self_similarity(inputs.query[:, :video], layout) > similarity
        alike_key = self_similarity(key - key.mean(1, keepdim=True), layout) > similarity
        alike_key = alike_key.repeat_interleave(inputs.query.shape[2] // key.shape[2], dim=1)[:, :, None]
        scores = draft_scores(inputs, scale) + layout.log_video_block_sizes
        # a row of nothing but -inf is no softmax; everything is kept there anyway
        shares = scores.masked_fill(~alike_key, -torch.inf).softmax(-1).nan_to_num(0.0)
        largest, order = shares.sort(dim=-1, descending=True, stable=True)
        within = largest.cumsum(-1) <= self.settings.mass
        within[..., 0] = True
        kept = torch.zeros_like(within).scatter_(-1, order, within)
        return mask_of(with_dense_text(kept | ~alike_key | ~alike_query[..., None], layout), inputs)


def self_similarity(x: Tensor, layout: BlockLayout) -> Tensor:
    """Mean cosine similarity between the tokens of each video block, float32 ``[B, H, V]``.

    Args:
        x: the video tokens, ``[B, S, H, D]``.
        layout: the blocks.
    """
    offsets = layout.offsets[: layout.num_video_blocks + 1]
    mean = pool_blocks(normalize(x, dim=-1), offsets, layout.block_size)
    return rearrange(mean.square().sum(-1), "b n h -> b h n")
