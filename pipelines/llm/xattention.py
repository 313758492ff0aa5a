"""XAttention: antidiagonal sums of the scores estimate what a block holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.block_mask import BlockMask
from draftattn.pipelines.llm.draft_prefill import check_block_size
from draftattn.pipelines.llm.inputs import CausalInputs
from draftattn.pipelines.llm.mass import smallest_set
from draftattn.pipelines.llm.system import SystemConfig
from draftattn.policy import CallContext

_CHUNK_SCORES = 2**26


@dataclass(frozen=True)
class XAttentionConfig(SystemConfig):
    """Every row of blocks attends to the fewest blocks that hold a share of its estimated attention.

    The scores of ``stride`` × ``stride`` tokens are estimated by the mean of their antidiagonal, which every row and
    column of them touches once; a softmax over these estimates, summed per block, is the attention of a block. The
    first block and a row's own block are always computed. Source: XAttention, arXiv 2503.16428.

    Args:
        threshold: the share (the paper's tau), in (0, 1].
        stride: tokens of a side, a power of two that divides the block.
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
        mass = antidiagonal_mass(inputs, self.config.stride, scale)
        forced = inputs.diagonal.clone()
        forced[..., 0] = True
        return inputs.block_mask(smallest_set(mass, self.config.threshold, forced & inputs.visible))


def antidiagonal_mass(inputs: CausalInputs, stride: int, scale: float | None = None) -> Tensor:
    """Estimated attention of block pairs, float32 ``[B, H, Q_blocks, K_blocks]``; rows of full blocks sum alike.

    Tokens past the end and before the first query count as zeros in the estimate of their group.
    """
    query, key, block = inputs.query, inputs.key, inputs.block_size
    kv_heads, head_dim = key.shape[2:]
    scale = head_dim**-0.5 if scale is None else scale
    rows, columns = inputs.query_offsets.shape[0] - 1, inputs.key_offsets.shape[0] - 1
    per_block = block // stride
    # queries begin at the boundary of their first block, so that strides fall on the same tokens as those of the keys
    front = inputs.query_offset - inputs.first_block * block
    query = F.pad(query, (0, 0, 0, 0, front, rows * block - front - query.shape[1]))
    key = F.pad(key, (0, 0, 0, 0, 0, columns * block - key.shape[1]))
    # [B, H, groups, stride * D]; a query's partner on the antidiagonal is the key from the other end
    query = query.unflatten(1, (-1, stride)).flip(2).permute(0, 3, 1, 2, 4).flatten(3)
    key = key.unflatten(1, (-1, stride)).permute(0, 3, 1, 2, 4).flatten(3)
    key_group = torch.arange(key.shape[2], device=key.device)
    first_real, last_real = front // stride, (inputs.key.shape[1] - 1) // stride
    chunk = max(1, _CHUNK_SCORES // (query.shape[0] * query.shape[1] * key.shape[2] * per_block)) * per_block
    parts = []
    for start in range(0, query.shape[2], chunk):
        part = query[:, :, start : start + chunk].unflatten(1, (kv_heads, -1))
        # later key groups are hidden from all rows of this part
        end = min(key.shape[2], start + part.shape[3] + inputs.first_block * per_block)
        scores = (part @ key[:, :, None, :end].transpose(-1, -2)).float().flatten(1, 2) * (scale / stride)
        query_group = torch.arange(start, start + part.shape[3], device=key.device)
        position = query_group + inputs.first_block * per_block
        seen = (key_group[:end] <= position[:, None]) & (key_group[:end] <= last_real)
        real = (query_group >= first_real) & (position <= last_real)
        shares = scores.masked_fill_(~seen, -torch.inf).softmax(-1).masked_fill_(~real[:, None], 0.0)
        sums = shares.unflatten(-2, (-1, per_block)).sum(-2)
        sums = F.pad(sums, (0, key.shape[2] - end)).unflatten(-1, (columns, per_block)).sum(-1)
        parts.append(sums)
    return torch.cat(parts, dim=2)
