"""Sliding tile attention: every tile attends to a window of tiles around it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import BlockSelection
from draftattn.layout import BlockLayout
from draftattn.policies.blocks import (
    BlockGrid,
    block_grid,
    block_places,
    budget,
    mask_of,
    pick,
    shared_by_heads,
    stack_maps,
)
from draftattn.policies.memory import Memory, call_generator
from draftattn.policies.profiling import candidate_errors
from draftattn.policy import CallContext

Window = tuple[int, int, int]

# Windows that use less of the budget are no match for the others.
_LEAST_USE = 0.8


@dataclass(frozen=True)
class SlidingTileConfig:
    """Sliding tile attention (STA, arXiv 2502.04507): a window of whole tiles in time, height and width.

    The window of a tile lies around it and moves inwards at the borders, so that all rows keep the same number of
    tiles. STA searches a window for each step, layer and head on 18 prompts beforehand. Here it is found while
    generating: in the first sparse call of a layer every head takes, of the windows that fill the budget of
    `DraftConfig.sparsity`, the one that errs least on ``queries`` random queries, and keeps it for the run. STA's tiles
    are 6 × 8 × 8 tokens; here they are the blocks of the layout, `DraftConfig.tile`. Text is dense.

    Args:
        window: tiles in time, height and width for all heads, such as ``(3, 3, 3)``; `sparsity` then has no meaning.
            None searches.
        queries: queries to search with, at least 1.
    """

    name: ClassVar[str] = "sliding_tile"
    matched_by: ClassVar[str] = "sparsity"

    window: Window | None = None
    queries: int = 64

    def __post_init__(self) -> None:
        if self.window is not None:
            window = tuple(self.window)
            if len(window) != 3 or not all(type(side) is int and side >= 1 for side in window):
                raise InputError(
                    f"window of policy 'sliding_tile' is {self.window!r}; it must be three positive integers "
                    "(time, height, width), in tiles"
                )
            object.__setattr__(self, "window", window)
        if type(self.queries) is not int or self.queries < 1:
            raise InputError(f"queries of policy 'sliding_tile' is {self.queries!r}; it must be at least 1")

    def make(self, config: DraftConfig) -> SlidingTilePolicy:
        """The policy."""
        return SlidingTilePolicy(config, self)


class SlidingTilePolicy:
    """See `SlidingTileConfig`."""

    def __init__(self, config: DraftConfig, settings: SlidingTileConfig) -> None:
        self.config = config
        self.settings = settings
        self._windows: Memory[Tensor] = Memory()

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.policy.MaskPolicy`."""
        layout, query, window = inputs.layout, inputs.query, self.settings.window
        kept = budget(self.config, inputs, context)
        masks = window_masks(layout, candidate_windows(block_grid(layout), kept) if window is None else (window,))
        if len(masks.maps) == 1:
            return mask_of(shared_by_heads(masks.blocks), inputs)
        known = self._windows.recall(inputs, context)
        if known is not None:
            return mask_of(pick(masks.blocks, known.value), inputs)
        rows = torch.randint(
            layout.grid.num_tokens,
            (self.settings.queries,),
            generator=call_generator(context, query.device),
            device=query.device,
        )
        choice = candidate_errors(inputs, masks.maps, rows, scale).argmin(-1)
        self._windows.keep(inputs, context, choice)
        return mask_of(pick(masks.blocks, choice), inputs)


@lru_cache(maxsize=256)
def candidate_windows(grid: BlockGrid, kept_per_row: int) -> tuple[Window, ...]:
    """Windows of at most so many tiles, for every extent in time the largest in space, the squarest of equals.

    Those that lie in another are left out, and those that use less than four fifths of the budget unless none uses
    more.

    >>> candidate_windows(BlockGrid(9, 2, 2), 9)
    ((2, 2, 2), (4, 2, 1), (9, 1, 1))
    """
    best: list[Window] = []
    for frames in range(1, min(grid.frames, kept_per_row) + 1):
        sides = [
            (height, width)
            for height, width in product(range(1, grid.height + 1), range(1, grid.width + 1))
            if frames * height * width <= kept_per_row
        ]
        # the shape that covers as much of the height as of the width
        height, width = max(sides, key=lambda x: (x[0] * x[1], -abs(x[0] / grid.height - x[1] / grid.width), x[0]))
        best.append((frames, height, width))
    least = min(_LEAST_USE * kept_per_row, max(_tiles(window) for window in best))
    large = [window for window in best if _tiles(window) >= least]
    return tuple(window for window in large if not any(_lies_in(window, other) for other in large))


def _lies_in(window: Window, other: Window) -> bool:
    return window != other and all(side <= limit for side, limit in zip(window, other, strict=True))


class WindowMasks(NamedTuple):
    """The masks of several windows: maps of the video blocks ``[C, V, V]``, and their lists."""

    maps: Tensor
    blocks: BlockSelection


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def window_masks(layout: BlockLayout, windows: tuple[Window, ...]) -> WindowMasks:
    """The masks of windows, from a cache."""
    places, sides = block_places(layout), torch.tensor(block_grid(layout), device="cpu")
    maps = []
    for window in windows:
        extent = torch.minimum(torch.tensor(window, device="cpu"), sides)
        first = torch.minimum((places - extent // 2).clamp(min=0), sides - extent)
        inside = (places[None] >= first[:, None]) & (places[None] < (first + extent)[:, None])
        maps.append(inside.all(-1))
    return WindowMasks(torch.stack(maps).to(layout.offsets.device), stack_maps(maps, layout))


def _tiles(window: Window) -> int:
    return window[0] * window[1] * window[2]
