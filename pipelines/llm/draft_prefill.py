"""The draft, for causal sequences: block means choose the blocks of every row."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from draftattn.errors import InputError
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.causal_budget import budget_scores
from draftattn.kernels.selection import BlockSelection, select_from_rank, select_largest
from draftattn.pipelines.llm.inputs import CausalInputs, check_block_size, mean_scores
from draftattn.pipelines.llm.system import SystemConfig
from draftattn.policy import CallContext

_MOST_SCORES = 2**31  # a million tokens in blocks of 128 with 32 heads


@dataclass(frozen=True)
class DraftPrefillConfig(SystemConfig):
    """Every row of blocks attends to the blocks whose mean key fits its mean query best (DraftAttention's draft).

    The first block (it holds the attention sink) and a row's own block are always among them. All rows and heads of a
    layer share its budget: a head that attends broadly gets the blocks that one with few keys in view can spare. See
    `draftattn.kernels.causal_budget.budget_scores` for how rows are compared.

    Args:
        density: share of the causal pairs of a query and a key to compute, in (0, 1].
        block_size: tokens of a block, 16 to 128.
        budget: ``"layer"``, or ``"row"``: all rows of all heads keep the same number of blocks, as far as they see so
            many, which leaves long rows sparser than short ones.
        residual: skipped blocks that lie wholly in the past contribute through their mean key and value, as with
            videos. Off by default: it made the perplexity of SmolLM2 a little worse.
    """

    dense_len: int = 4096
    density: float = 0.25
    block_size: int = 128
    budget: Literal["layer", "row"] = "layer"
    residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise InputError(f"density is {self.density}; it must be in (0, 1]")
        check_block_size(self.block_size)


class DraftRows:
    """The mask policy of `DraftPrefillConfig`."""

    def __init__(self, config: DraftPrefillConfig) -> None:
        self.config = config

    def __call__(self, inputs: CausalInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.pipelines.llm.inputs.CausalPolicy`."""
        del context  # the draft is made anew in every call
        scores = budget_scores(mean_scores(inputs, scale), inputs.first_block)
        batch, heads, rows, columns = scores.shape
        density = self.config.density
        if self.config.budget == "row":
            chosen = select_largest(scores, blocks_of_rows(density, inputs.first_block, rows))
        else:
            # heads as the rows of one, whose blocks are chosen in one go
            shared = _heads_that_share(heads, rows * columns)
            kept = blocks_of_layer(density, inputs.first_block, rows, shared, inputs.block_size)
            ranked = scores.view(batch, heads // shared, shared * rows, columns)
            together = select_from_rank(ranked, shared * rows * columns - kept + 1)
            chosen = BlockSelection(*(x.view(batch, heads, rows, *x.shape[3:]) for x in together))
        mask = BlockMask(
            chosen.kv_num_blocks, chosen.kv_indices, inputs.query_offsets, inputs.key_offsets, inputs.block_size
        )
        mask.__dict__["block_map"] = chosen.block_map  # spares the cached property its scatter
        return mask


def _heads_that_share(heads: int, scores: int) -> int:
    """The most heads, a divisor of all, whose scores one kernel can rank together."""
    return max(n for n in range(1, heads + 1) if n == 1 or (heads % n == 0 and n * scores < _MOST_SCORES))


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


@functools.lru_cache(maxsize=64)
def blocks_of_layer(density: float, first: int, rows: int, heads: int, block_size: int) -> int:
    """How many blocks all rows of all heads keep together; at least the first one and their own.

    Args:
        density: share of causal pairs, in (0, 1].
        first: whole blocks before the first row's own.
        rows: rows of blocks of a head.
        heads: heads of the layer.
        block_size: tokens of a block.

    >>> blocks_of_layer(1.0, 0, 8, 2, 64), blocks_of_layer(0.5, 0, 64, 1, 64), blocks_of_layer(0.01, 0, 64, 1, 64)
    (72, 1055, 127)
    """
    seen = sum(first + row + 1 for row in range(rows))
    forced = 2 * rows - (first == 0)
    # pairs above the diagonal of a row's own block, in blocks
    hidden = rows * (block_size - 1) / (2 * block_size)
    spare = density * heads * (seen - hidden) - heads * (forced - hidden)
    return heads * forced + min(max(math.floor(spare + 1e-6), 0), heads * (seen - forced))
