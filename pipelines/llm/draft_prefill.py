"""The draft, for causal sequences: block means choose the blocks of every row."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import select_largest
from draftattn.pipelines.llm.inputs import CausalInputs
from draftattn.pipelines.llm.system import SystemConfig
from draftattn.policy import CallContext


@dataclass(frozen=True)
class DraftPrefillConfig(SystemConfig):
    """Every row of blocks attends to the blocks whose mean key fits its mean query best (DraftAttention's draft).

    The first block (it holds the attention sink) and a row's own block are always among them. All rows keep the same
    number of blocks, as far as they see so many: long rows are sparser than short ones, and programs finish together.

    Args:
        density: share of the causal pairs of a query and a key to compute, in (0, 1].
        block_size: tokens of a block, 16 to 128.
        residual: skipped blocks that lie wholly in the past contribute through their mean key and value, as with
            videos. Off by default: it made the perplexity of SmolLM2 a little worse.
    """

    dense_len: int = 4096
    density: float = 0.25
    block_size: int = 128
    residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise InputError(f"density is {self.density}; it must be in (0, 1]")
        check_block_size(self.block_size)


def check_block_size(block_size: int) -> None:
    """Raises `InputError` unless kernels take blocks of this size."""
    if not 16 <= block_size <= 128:
        raise InputError(f"block_size is {block_size}; it must be 16 to 128")


class DraftRows:
    """The mask policy of `DraftPrefillConfig`."""

    def __init__(self, config: DraftPrefillConfig) -> None:
        self.config = config

    def __call__(self, inputs: CausalInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.pipelines.llm.inputs.CausalPolicy`."""
        del context  # the draft is made anew in every call
        scores = mean_scores(inputs, scale)
        rows, columns = scores.shape[-2:]
        forced = inputs.diagonal.clone()
        forced[..., 0] = True
        scores = scores.masked_fill(forced, torch.inf).masked_fill_(~inputs.visible, -torch.inf)
        kept = blocks_of_rows(self.config.density, columns - rows, rows)
        chosen = select_largest(scores, kept)
        mask = BlockMask(
            chosen.kv_num_blocks, chosen.kv_indices, inputs.query_offsets, inputs.key_offsets, inputs.block_size
        )
        mask.__dict__["block_map"] = chosen.block_map  # spares the cached property its scatter
        return mask


def mean_scores(inputs: CausalInputs, scale: float | None = None) -> Tensor:
    """Scores of mean queries with mean keys, float32 ``[B, H, Q_blocks, K_blocks]``."""
    query, key = inputs.mean_query, inputs.mean_key
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # [B, H_kv, group, Q, D] with [B, H_kv, 1, D, K]
    grouped = (query * scale).unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4)
    return (grouped @ key.permute(0, 2, 3, 1)[:, :, None]).flatten(1, 2)


@functools.lru_cache(maxsize=64)
def blocks_of_rows(density: float, first: int, rows: int) -> int:
    """The most blocks a row may keep so that all rows together stay within a causal density; at least 2.

    Args:
        density: share of causal pairs, in (0, 1].
        first: whole blocks before the first row's own.
        rows: rows of blocks.

    >>> blocks_of_rows(1.0, 0, 8), blocks_of_rows(0.5, 0, 64), blocks_of_rows(0.1, 0, 256)
    (8, 19, 13)
    """
    seen = [first + row + 1 for row in range(rows)]
    # half of a diagonal block is causal
    budget = density * sum(count - 0.5 for count in seen) + 1e-6
    low, high = min(2, seen[-1]), seen[-1]
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(middle, count) - 0.5 for count in seen) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
