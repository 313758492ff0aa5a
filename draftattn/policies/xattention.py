"""XAttention: antidiagonal sums estimate what blocks hold, and rows keep a share of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from draftattn.antidiagonal import AntidiagonalGroups, antidiagonal_groups, antidiagonal_mass
from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.layout import BlockLayout
from draftattn.policies.blocks import keep_mass, mask_of, with_dense_text
from draftattn.policy import CallContext


@dataclass(frozen=True)
class XAttentionConfig:
    """XAttention (arXiv 2503.16428): every row keeps the fewest blocks that hold a share of its estimated mass.

    The mass of a pair of blocks is estimated along antidiagonals of its scores (`draftattn.antidiagonal`). Text is
    dense.

    Args:
        mass: share of each row's mass that is kept, the paper's τ, in (0, 1]; it sets the density, `sparsity` of
            `DraftConfig` does not.
        stride: tokens between antidiagonals, 2 to 64: larger is cheaper and coarser.
    """

    name: ClassVar[str] = "xattention"
    matched_by: ClassVar[str] = "mass"

    mass: float = 0.9
    stride: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise InputError(f"mass of policy 'xattention' is {self.mass!r}; it must be in (0, 1]")
        if type(self.stride) is not int or not 2 <= self.stride <= 64:
            raise InputError(f"stride of policy 'xattention' is {self.stride!r}; it must be a whole number, 2 to 64")

    def make(self, config: DraftConfig) -> XAttentionPolicy:
        """The policy."""
        return XAttentionPolicy(config, self)


@dataclass(frozen=True)
class XAttentionPolicy:
    """See `XAttentionConfig`."""

    config: DraftConfig
    settings: XAttentionConfig

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.policy.MaskPolicy`."""
        del context
        layout = inputs.layout
        groups = _groups(layout, self.settings.stride)
        shares = antidiagonal_mass(inputs.query, inputs.key, groups, scale=scale)
        return mask_of(with_dense_text(keep_mass(shares, self.settings.mass), layout), inputs)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def _groups(layout: BlockLayout, stride: int) -> AntidiagonalGroups:
    return antidiagonal_groups(layout.offsets[: layout.num_video_blocks + 1], layout.block_size, stride)
