"""Sparse VideoGen: every head looks either around its own frame or at its own place in all frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import BlockSelection
from draftattn.layout import BlockLayout
from draftattn.policies.blocks import block_grid, block_places, budget, mask_of, pick, stack_maps
from draftattn.policies.memory import call_generator
from draftattn.policies.profiling import candidate_errors
from draftattn.policy import CallContext


@dataclass(frozen=True)
class SvgConfig:
    """Sparse VideoGen (arXiv 2502.01776): in every call each head takes a spatial or a temporal mask, which errs less.

    Both are bands. The *spatial* mask keeps the blocks near a row's own where blocks are ordered frame by frame: its
    own frame and parts of the next ones. The *temporal* mask is the same band where blocks are ordered place by place:
    the same place in all frames and parts of the places beside it. Both keep the first frame, and text is dense. The
    bands are as wide as `DraftConfig.sparsity` allows. Which is better is profiled online: the outputs of ``queries``
    random queries with either mask are compared with their exact outputs, and the lower mean squared error wins.

    Sparse VideoGen reorders the tokens of temporal heads to make their band contiguous; here blocks are tiles of
    neighbouring tokens, and the band is one of tiles.

    Args:
        queries: queries to profile with, at least 1.
        first_frame: whether everything attends to the first frame. On few frames that alone may exceed the budget.
    """

    name: ClassVar[str] = "svg"
    matched_by: ClassVar[str] = "sparsity"

    queries: int = 64
    first_frame: bool = True

    def __post_init__(self) -> None:
        if type(self.queries) is not int or self.queries < 1:
            raise InputError(f"queries of policy 'svg' is {self.queries!r}; it must be a whole number, at least 1")

    def make(self, config: DraftConfig) -> SvgPolicy:
        """The policy."""
        return SvgPolicy(config, self)


@dataclass(frozen=True)
class SvgPolicy:
    """See `SvgConfig`."""

    config: DraftConfig
    settings: SvgConfig

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.policy.MaskPolicy`."""
        layout, device = inputs.layout, inputs.query.device
        masks = two_masks(layout, budget(self.config, inputs, context), self.settings.first_frame)
        rows = torch.randint(
            layout.grid.num_tokens, (self.settings.queries,), generator=call_generator(context, device), device=device
        )
        errors = candidate_errors(inputs, masks.maps, rows, scale)
        return mask_of(pick(masks.blocks, errors.argmin(-1)), inputs)


class TwoMasks(NamedTuple):
    """The spatial and the temporal mask: maps of the video blocks ``[2, V, V]``, and their lists."""

    maps: Tensor
    blocks: BlockSelection


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def two_masks(layout: BlockLayout, kept_per_row: int, first_frame: bool = True) -> TwoMasks:
    """The spatial and the temporal mask that keep at most ``kept_per_row`` blocks a row on average, from a cache."""
    grid, (frame, row, column) = block_grid(layout), block_places(layout).unbind(-1)
    place = row * grid.width + column
    sink = (frame == 0) if first_frame else torch.zeros_like(frame, dtype=torch.bool)
    maps = []
    for order in (frame * grid.num_places + place, place * grid.frames + frame):
        distance = (order[:, None] - order[None]).abs()
        budget = kept_per_row * len(order)
        width = _widest(lambda width, x=distance: int(((x <= width) | sink).sum()), budget, len(order))  # type: ignore[misc]
        maps.append((distance <= width) | sink)
    return TwoMasks(torch.stack(maps).to(layout.offsets.device), stack_maps(maps, layout))


def _widest(count: Callable[[int], int], budget: int, limit: int) -> int:
    """The largest number below ``limit`` whose count is within the budget; 0 if none is."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if count(middle) <= budget:
            low = middle
        else:
            high = middle
    return low
