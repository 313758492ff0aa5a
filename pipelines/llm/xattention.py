"""XAttention: antidiagonal sums of the scores estimate what a block holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from draftattn.errors import InputError
from draftattn.kernels.antidiagonal_mass import antidiagonal_mass
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.smallest_set import smallest_set
from draftattn.pipelines.llm.inputs import CausalInputs, check_block_size
from draftattn.pipelines.llm.system import SystemConfig
from draftattn.policy import CallContext


@dataclass(frozen=True)
class XAttentionConfig(SystemConfig):
    """Every row of blocks attends to the fewest blocks that hold a share of its estimated attention.

    The scores of ``stride`` × ``stride`` tokens are estimated by the mean of their antidiagonal, which every row and
    column of them touches once; a softmax over these estimates, summed per block, is the attention of a block. The
    first block and a row's own block are always computed. Source: XAttention, arXiv 2503.16428.

    Args:
        threshold: the share (the paper's tau), in (0, 1].
        stride: tokens of a side; divides the block.
        block_size: tokens of a block, 16 to 128.
    """

    dense_len: int = 8192
    threshold: float = 0.9
    stride: int = 16
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold is {self.threshold}; it must be in (0, 1]")
        if self.stride < 1 or self.block_size % self.stride:
            raise InputError(f"stride is {self.stride}; it must divide the block size {self.block_size}")


class XAttentionPolicy:
    """The mask policy of `XAttentionConfig`."""

    def __init__(self, config: XAttentionConfig) -> None:
        self.config = config

    def __call__(self, inputs: CausalInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.pipelines.llm.inputs.CausalPolicy`."""
        del context
        mass = antidiagonal_mass(inputs.query, inputs.key, inputs.block_size, self.config.stride, scale=scale)
        forced = torch.zeros(mass.shape[2:], dtype=torch.bool, device=mass.device)
        forced[:, 0] = True
        forced.diagonal(inputs.first_block).fill_(True)
        return inputs.block_mask(smallest_set(mass, self.config.threshold, forced))
