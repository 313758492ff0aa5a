"""The best blocks there are: an upper bound for every policy that keeps the same number of blocks in each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from draftattn.config import DraftConfig
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import select_largest
from draftattn.policies.blocks import budget, mask_of
from draftattn.policies.exact import exact_mass, exact_output
from draftattn.policy import CallContext


@dataclass(frozen=True)
class OracleConfig:
    """Every row keeps the blocks with the largest exact attention mass, `DraftConfig.sparsity` says how many.

    No rule that keeps as many blocks in each row has a higher recall. It computes dense attention to know them, so it
    is slower than dense attention: a bound to measure others by, nothing to generate with.
    """

    name: ClassVar[str] = "oracle"
    matched_by: ClassVar[str] = "sparsity"

    def make(self, config: DraftConfig) -> OraclePolicy:
        """The policy."""
        return OraclePolicy(config)


@dataclass(frozen=True)
class OraclePolicy:
    """See `OracleConfig`."""

    config: DraftConfig

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.policy.MaskPolicy`."""
        layout, video = inputs.layout, inputs.layout.num_video_blocks
        _, lse = exact_output(inputs, self.config.backend, scale)
        mass = exact_mass(inputs, lse, scale)[..., :video, :video].contiguous()
        kept = budget(self.config, inputs, context)
        return mask_of(select_largest(mass, kept, dense_tail=layout.num_blocks - video), inputs)
