"""Radial attention: a fixed mask whose window in space halves with every doubling of the distance in time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import BlockSelection
from draftattn.layout import BlockLayout
from draftattn.policies.blocks import BlockGrid, block_grid, block_places, budget, mask_of, shared_by_heads, stack_maps
from draftattn.policy import CallContext

_STEPS_PER_OCTAVE = 16


@dataclass(frozen=True)
class RadialConfig:
    r"""Radial attention (arXiv 2506.19852, equation 5), in tiles: no look at queries or keys.

    Let :math:`P` be the tiles of a frame, :math:`d` the distance of two tiles in frames and :math:`p` in space, counted
    along the rows of tiles. With :math:`r = \lfloor \log_2 \max(d, 1) \rfloor` and the window :math:`w = f P / 2^r`, a
    pair is kept if :math:`p + 1 \le w`, or if :math:`p = 0` and :math:`d` is a multiple of :math:`\lceil 1 / w \rceil`.
    Everything attends to the first frame, as the paper does it for Wan. Text is dense.

    Args:
        decay: the factor :math:`f` of all windows, above 0. None takes the one that keeps most blocks within the budget
            of `DraftConfig.sparsity`.
        first_frame: whether everything attends to the first frame. On few frames that alone may exceed the budget.
    """

    name: ClassVar[str] = "radial"
    matched_by: ClassVar[str] = "sparsity"

    decay: float | None = None
    first_frame: bool = True

    def __post_init__(self) -> None:
        if self.decay is not None and not self.decay > 0:
            raise InputError(f"decay of policy 'radial' is {self.decay!r}; it must be above 0")

    def make(self, config: DraftConfig) -> RadialPolicy:
        """The policy."""
        return RadialPolicy(config, self)


@dataclass(frozen=True)
class RadialPolicy:
    """See `RadialConfig`."""

    config: DraftConfig
    settings: RadialConfig

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.policy.MaskPolicy`."""
        del scale
        kept = budget(self.config, inputs, context)
        return mask_of(_radial_blocks(inputs.layout, self.settings, kept), inputs)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def _radial_blocks(layout: BlockLayout, settings: RadialConfig, kept_per_row: int) -> BlockSelection:
    grid = block_grid(layout)
    decay = settings.decay
    if decay is None:
        budget = kept_per_row * layout.num_video_blocks
        octaves = math.log2(2 * grid.frames) + math.log2(2 * layout.num_video_blocks)
        steps = [2 * grid.frames * 2 ** (-i / _STEPS_PER_OCTAVE) for i in range(int(octaves * _STEPS_PER_OCTAVE) + 1)]
        counts = [_count_pairs(grid, step, settings.first_frame) for step in steps]
        # not monotonic: a wider window may take its distant frames in longer strides
        fitting = [(count, step) for count, step in zip(counts, steps, strict=True) if count <= budget]
        decay = max(fitting)[1] if fitting else steps[-1]
    places = block_places(layout)
    space = places[:, 1] * grid.width + places[:, 2]
    frame_distance = (places[:, None, 0] - places[None, :, 0]).abs()
    chosen = _kept_at(grid, decay)[frame_distance, (space[:, None] - space[None]).abs()]
    if settings.first_frame:
        chosen = chosen | (places[:, 0] == 0)
    return shared_by_heads(stack_maps([chosen], layout))


def _kept_at(grid: BlockGrid, decay: float) -> Tensor:
    """Which distances in time and space are kept: bool ``[T, P]``."""
    distance, space = torch.arange(grid.frames, device="cpu")[:, None], torch.arange(grid.num_places, device="cpu")
    window = decay * grid.num_places / 2 ** distance.clamp(min=1).double().log2().floor()
    return (space + 1 <= window) | ((space == 0) & (distance % (1 / window).ceil() == 0))


def _count_pairs(grid: BlockGrid, decay: float, first_frame: bool) -> int:
    """Pairs of tiles that are kept."""
    time, space = (_pairs_at_distance(count) for count in (grid.frames, grid.num_places))
    whole = 0
    if first_frame:
        # each frame sees the first one whole, at its own distance
        time = time - 1
        time[0] = grid.frames - 1
        whole = grid.frames * grid.num_places**2
    return whole + int((_kept_at(grid, decay) * time[:, None] * space).sum())


def _pairs_at_distance(count: int) -> Tensor:
    """How many ordered pairs of ``count`` places in a row lie at each distance."""
    pairs = 2 * (count - torch.arange(count, device="cpu"))
    pairs[0] = count
    return pairs
