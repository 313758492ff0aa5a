"""FlexPrefill: each head takes the pattern that fits it, with as many blocks as its attention needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.smallest_set import smallest_set
from draftattn.pipelines.llm.inputs import CausalInputs, check_block_size, mean_scores
from draftattn.pipelines.llm.system import SystemConfig
from draftattn.pipelines.llm.vertical_slash import vertical_slash_map, vertical_slash_mass
from draftattn.policy import CallContext


@dataclass(frozen=True)
class FlexPrefillConfig(SystemConfig):
    """Heads whose block means tell where attention goes choose by them, the others by columns and diagonals.

    The attention of the last queries by block is compared with its estimate from block means: where the square root
    of their Jensen-Shannon divergence is below ``tau``, the head keeps the fewest block pairs that hold a share
    ``gamma`` of the estimated attention of all its rows (*query-aware*); elsewhere the fewest columns and the fewest
    distances that hold this share of the last queries' attention (*vertical-slash*, in blocks). The first block and a
    row's own block are always computed. Source: FlexPrefill, arXiv 2502.20766.

    Args:
        gamma: the share, in (0, 1].
        tau: the threshold of the test, 0 or more; 0 makes all heads vertical-slash.
        min_budget: tokens that columns and distances hold at least.
        block_size: tokens of a block, 16 to 128; so many last queries are looked at.
    """

    dense_len: int = 8192
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        if not 0 < self.gamma <= 1:
            raise InputError(f"gamma is {self.gamma}; it must be in (0, 1]")
        for name in ("tau", "min_budget"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")


class FlexPrefillPolicy:
    """The mask policy of `FlexPrefillConfig`."""

    def __init__(self, config: FlexPrefillConfig) -> None:
        self.config = config

    def __call__(self, inputs: CausalInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.pipelines.llm.inputs.CausalPolicy`."""
        del context
        gamma = self.config.gamma
        estimate = mean_scores(inputs, scale).masked_fill_(~inputs.visible, -torch.inf).softmax(-1)
        vertical, slash = vertical_slash_mass(inputs, inputs.block_size, scale)
        # the published code looks at the last queries' own mean; they are one block, or the end of two
        own_mean = inputs.query[:, -inputs.block_size :].float().mean(1, keepdim=True)
        scale = own_mean.shape[-1] ** -0.5 if scale is None else scale
        grouped = (own_mean * scale).unflatten(2, (inputs.mean_key.shape[2], -1)).permute(0, 2, 3, 1, 4)
        last_row = (grouped @ inputs.mean_key.permute(0, 2, 3, 1)[:, :, None]).flatten(1, 2)[:, :, 0].softmax(-1)
        query_aware = jensen_shannon(vertical, last_row).sqrt() < self.config.tau

        by_pairs = smallest_set(estimate.flatten(-2), gamma).view(estimate.shape)
        first = torch.zeros(vertical.shape[-1], dtype=torch.bool, device=vertical.device)
        first[0] = True
        min_kept = -(-self.config.min_budget // inputs.block_size)
        columns, bands = (smallest_set(mass, gamma, first, min_kept) for mass in (vertical, slash))
        by_lines = vertical_slash_map(inputs, columns, bands)
        chosen = torch.where(query_aware[..., None, None], by_pairs, by_lines)
        chosen[..., 0] = True
        chosen.diagonal(inputs.first_block, -2, -1).fill_(True)
        return inputs.block_mask(chosen)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Divergence of distributions over the last dimension, in nats, not negative.

    >>> round(jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item(), 4)
    0.6931
    """
    both = torch.stack([first, second])
    # xlogy is 0 where a probability is 0
    divergences = (torch.xlogy(both, both) - torch.xlogy(both, both.mean(0))).sum(-1)
    return divergences.mean(0).clamp(min=0)
