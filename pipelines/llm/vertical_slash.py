"""MInference's vertical-slash pattern, in blocks: columns and diagonals that the last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import select_largest
from draftattn.kernels.split_block_lse import split_block_lse
from draftattn.pipelines.llm.inputs import CausalInputs, check_block_size
from draftattn.pipelines.llm.system import SystemConfig
from draftattn.policy import CallContext


@dataclass(frozen=True)
class VerticalSlashConfig(SystemConfig):
    """Every head attends to the columns and diagonals that its last queries put most attention on.

    The exact attention of the last queries is summed by key and by distance; both are chosen in units of blocks, and a
    band of distances covers the two diagonals of blocks it crosses. The first block and the nearest distances are
    always chosen. Source: MInference, arXiv 2407.02490, whose kernel takes columns as single keys.

    Args:
        vertical_size: tokens of the columns, rounded up to blocks.
        slash_size: tokens of the distances, rounded up to blocks.
        last_queries: queries that are looked at.
        block_size: tokens of a block, 16 to 128.
    """

    dense_len: int = 8192
    vertical_size: int = 1024
    slash_size: int = 1024
    last_queries: int = 64
    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        for name in ("vertical_size", "slash_size", "last_queries"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")


class VerticalSlashPolicy:
    """The mask policy of `VerticalSlashConfig`."""

    def __init__(self, config: VerticalSlashConfig) -> None:
        self.config = config

    def __call__(self, inputs: CausalInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.pipelines.llm.inputs.CausalPolicy`."""
        del context
        vertical, slash = vertical_slash_mass(inputs, self.config.last_queries, scale)
        sizes = self.config.vertical_size, self.config.slash_size
        columns, bands = (
            _largest(mass, -(-size // inputs.block_size)) for mass, size in zip((vertical, slash), sizes, strict=True)
        )
        return inputs.block_mask(vertical_slash_map(inputs, columns, bands))


def vertical_slash_mass(inputs: CausalInputs, last_queries: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of the last queries by key block and by distance, each float32 ``[B, H, K_blocks]``.

    Entry ``d`` of the second is the attention at distances ``d * block_size`` to ``(d + 1) * block_size - 1``. Both
    are averaged over the queries, so that each sums to 1.
    """
    query, size = inputs.query[:, -last_queries:], inputs.block_size
    lse = split_block_lse(query, inputs.key, size, scale=scale)
    until, behind = lse.flatten(-2).softmax(-1).unflatten(-1, (2, -1)).unbind(-2)
    by_key = (until + behind).mean(2)
    # keys behind a query's own place in a block are one band nearer, as is the whole of the next block
    until[..., 1:].add_(behind[..., :-1])
    first = inputs.key.shape[1] - query.shape[1]
    by_distance = torch.zeros_like(by_key)
    # of queries in one block the bands are the blocks, from the own one backwards
    for own in range(first // size, by_key.shape[-1]):
        of_block = until[:, :, max(own * size - first, 0) : (own + 1) * size - first, : own + 1]
        by_distance[..., : own + 1].add_(of_block.sum(2).flip(-1))
    return by_key, by_distance.div_(query.shape[1])


def vertical_slash_map(inputs: CausalInputs, columns: Tensor, bands: Tensor) -> Tensor:
    """The causal block map of chosen key blocks and bands of distances, both bool ``[B, H, K_blocks]``."""
    num_blocks = columns.shape[-1]
    rows = num_blocks - inputs.first_block
    diagonals = bands | F.pad(bands, (1, 0))[..., :-1]
    # a row of the map is the diagonals backwards, and begins one place earlier than that of the row above
    near = F.pad(diagonals.flip(-1), (0, rows - 1)).unfold(-1, num_blocks, 1).flip(-2)
    return columns[:, :, None].expand(-1, -1, rows, -1).tril(inputs.first_block).logical_or_(near)


def _largest(mass: Tensor, count: int) -> Tensor:
    """The largest entries of a row, the first always among them, as a map."""
    mass = mass.clone()
    mass[..., 0] = torch.inf
    return select_largest(mass[:, :, None], min(count, mass.shape[-1])).block_map[:, :, 0]
