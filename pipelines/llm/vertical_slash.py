"""MInference's vertical-slash pattern, in blocks: columns and diagonals that the last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.block_mask import BlockMask
from draftattn.pipelines.llm.draft_prefill import check_block_size
from draftattn.pipelines.llm.inputs import CausalInputs
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
    query, key = inputs.query[:, -last_queries:], inputs.key
    count, num_keys = query.shape[1], key.shape[1]
    scale = key.shape[-1] ** -0.5 if scale is None else scale
    columns = inputs.key_offsets.shape[0] - 1
    padding = columns * inputs.block_size - num_keys
    position = torch.arange(num_keys - count, num_keys, device=key.device)
    hidden = torch.arange(num_keys, device=key.device) > position[:, None]
    vertical, slash = [], []
    # a key head at a time: its probabilities are as large as a copy of the keys
    for head, queries in enumerate(query.unflatten(2, (key.shape[2], -1)).unbind(2)):
        scores = torch.einsum("bqgd,bkd->bgqk", queries, key[:, :, head]).float() * scale
        shares = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        by_key = shares.sum(-2) / count
        # Reversed and padded by a row's length, rows stored one place shorter slide by one from row to row: a distance
        # comes to stand in one column.
        skewed = F.pad(shares.flip(-1), (0, count)).flatten(-2)[..., :-count]
        by_distance = skewed.unflatten(-1, (count, num_keys + count - 1)).sum(-2)[..., count - 1 :] / count
        vertical.append(by_key)
        slash.append(by_distance)
    by_block = (
        F.pad(torch.cat(parts, dim=1), (0, padding)).unflatten(-1, (columns, -1)).sum(-1) for parts in (vertical, slash)
    )
    by_key, by_distance = by_block
    return by_key, by_distance


def vertical_slash_map(inputs: CausalInputs, columns: Tensor, bands: Tensor) -> Tensor:
    """The block map of chosen key blocks and bands of distances, both bool ``[B, H, K_blocks]``."""
    rows = inputs.query_offsets.shape[0] - 1
    block = torch.arange(columns.shape[-1], device=columns.device)
    distance = (torch.arange(rows, device=columns.device) + inputs.first_block)[:, None] - block
    diagonals = bands | F.pad(bands, (1, 0))[..., :-1]
    near = diagonals[..., distance.clamp(min=0)]
    return (columns[:, :, None] | near) & inputs.visible


def _largest(mass: Tensor, count: int) -> Tensor:
    """The largest entries of a row, the first always among them, as a map."""
    mass = mass.clone()
    mass[..., 0] = torch.inf
    best = mass.topk(min(count, mass.shape[-1]), dim=-1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, True)
