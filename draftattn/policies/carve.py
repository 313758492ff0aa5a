"""AttenCarve: the best blocks of a row, enough for a share of its mass, and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from draftattn.config import DraftConfig
from draftattn.draft import draft_map
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.layout import BlockLayout
from draftattn.policies.blocks import (
    block_places,
    budget,
    keep_mass,
    mask_of,
    pool_for_draft,
    rank_in_row,
    with_dense_text,
)
from draftattn.policy import CallContext


@dataclass(frozen=True)
class CarveConfig:
    """The rule of Jenga's AttenCarve (arXiv 2505.16864, section 3.1).

    A row keeps the union of three sets: its best blocks in the draft map, as many as `DraftConfig.sparsity` leaves; the
    fewest best blocks that hold ``mass`` of its draft map; the tiles that touch its own in space or time, diagonally
    too. Text is dense. Jenga orders tokens along a space-filling curve; here blocks are tiles, so its 26 neighbours are
    the 3 × 3 × 3 tiles around one. Density is therefore above ``1 - sparsity``; on small grids neighbours alone may
    fill the budget.

    Args:
        mass: share of each row's draft map that is kept at least, in [0, 1]; 0.3 as in Jenga's scripts.
        neighbours: whether touching tiles are kept. Without them Jenga saw seams between blocks.
    """

    name: ClassVar[str] = "carve"
    matched_by: ClassVar[str] = "sparsity"

    mass: float = 0.3
    neighbours: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.mass <= 1:
            raise InputError(f"mass of policy 'carve' is {self.mass!r}; it must be in [0, 1]")

    def make(self, config: DraftConfig) -> CarvePolicy:
        """The policy."""
        return CarvePolicy(config, self)


@dataclass(frozen=True)
class CarvePolicy:
    """See `CarveConfig`."""

    config: DraftConfig
    settings: CarveConfig

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.policy.MaskPolicy`."""
        pool_for_draft(self.config, inputs)
        layout = inputs.layout
        shares = draft_map(inputs, scale)
        kept = rank_in_row(shares) < budget(self.config, inputs, context)
        kept |= keep_mass(shares, self.settings.mass)
        if self.settings.neighbours:
            kept |= touching(layout)
        return mask_of(with_dense_text(kept, layout), inputs)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def touching(layout: BlockLayout) -> Tensor:
    """Which tiles touch each other, each itself among them: bool ``[V, V]``."""
    places = block_places(layout)
    near = ((places[:, None] - places[None]).abs() <= 1).all(-1)
    return near.to(layout.offsets.device)
