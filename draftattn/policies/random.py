"""Random blocks: a lower bound for every policy that keeps the same number of blocks in each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import select_largest
from draftattn.policies.blocks import budget, mask_of
from draftattn.policies.memory import call_generator
from draftattn.policy import CallContext


@dataclass(frozen=True)
class RandomConfig:
    """Every row keeps blocks drawn at random, `DraftConfig.sparsity` says how many; its own has no privilege.

    Each layer, step and guidance branch draws others, and every run the same.

    Args:
        seed: another one draws other blocks.
    """

    name: ClassVar[str] = "random"
    matched_by: ClassVar[str] = "sparsity"

    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.seed) is not int:
            raise InputError(f"seed of policy 'random' is {self.seed!r}; it must be a whole number")

    def make(self, config: DraftConfig) -> RandomPolicy:
        """The policy."""
        return RandomPolicy(config, self)


@dataclass(frozen=True)
class RandomPolicy:
    """See `RandomConfig`."""

    config: DraftConfig
    settings: RandomConfig

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.policy.MaskPolicy`."""
        del scale
        query, layout = inputs.query, inputs.layout
        video = layout.num_video_blocks
        noise = torch.rand(
            (query.shape[0], query.shape[2], video, video),
            generator=call_generator(context, query.device, self.settings.seed),
            device=query.device,
        )
        kept = budget(self.config, inputs, context)
        return mask_of(select_largest(noise, kept, dense_tail=layout.num_blocks - video), inputs)
