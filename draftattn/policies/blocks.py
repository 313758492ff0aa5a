"""What several policies do with blocks: their places in the video, choosing them by rank or mass, making the mask."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from draftattn.config import DraftConfig
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import BlockSelection, list_blocks
from draftattn.layout import BlockLayout
from draftattn.policy import CallContext
from draftattn.selection import blocks_kept_per_row


class BlockGrid(NamedTuple):
    """How many tiles a video has in time, height and width; blocks are numbered in this order."""

    frames: int
    height: int
    width: int

    @property
    def num_places(self) -> int:
        """Tiles beside each other in space."""
        return self.height * self.width


def block_grid(layout: BlockLayout) -> BlockGrid:
    """The grid of a layout's video blocks.

    >>> from draftattn.layout import TokenGrid, block_layout
    >>> block_grid(block_layout(TokenGrid(9, 16, 28), (1, 8, 14)))
    BlockGrid(frames=9, height=2, width=2)
    """
    return BlockGrid(*(-(-side // extent) for side, extent in zip(layout.grid, layout.tile, strict=True)))


def block_places(layout: BlockLayout) -> Tensor:
    """Frame, row and column of each video block in the block grid: int64 ``[V, 3]`` on the CPU."""
    sides = [torch.arange(side, device="cpu") for side in block_grid(layout)]
    return torch.cartesian_prod(*sides).view(-1, 3)


class TokensOfBlocks(NamedTuple):
    """The tokens of each video block.

    Args:
        places: int64 ``[V, n]``, in the sequence; past a block's end some valid place.
        valid: bool ``[V, n]``.
        block: int64 ``[video tokens]``, the block of each token.
    """

    places: Tensor
    valid: Tensor
    block: Tensor


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def tokens_of_blocks(layout: BlockLayout) -> TokensOfBlocks:
    """The tokens of the video blocks, from a cache."""
    offsets = layout.offsets[: layout.num_video_blocks + 1].long().cpu()
    lengths = offsets.diff()
    column = torch.arange(int(lengths.max()), device="cpu")
    valid = column < lengths[:, None]
    index = torch.where(valid, offsets[:-1, None] + column, 0)
    block = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
    return TokensOfBlocks(*(x.to(layout.offsets.device) for x in (index, valid, block)))


def budget(config: DraftConfig, inputs: AttentionInputs, context: CallContext) -> int:
    """Blocks of video that a row of this call keeps."""
    sparsity = config.sparsity_at(context.layer, context.step, context.num_steps)
    return blocks_kept_per_row(inputs.layout.num_video_blocks, sparsity)


def pool_for_draft(config: DraftConfig, inputs: AttentionInputs) -> None:
    """Pools all that a draft and the residual need in one go, where both are made of plain means."""
    if config.residual and not config.weighted_means:
        inputs.pool("query", "key", "value")


def rank_in_row(scores: Tensor) -> Tensor:
    """How many entries of its row come before each entry, from the largest on; of equal ones the first: int64.

    >>> rank_in_row(torch.tensor([0.2, 0.5, 0.2])).tolist()
    [1, 0, 2]
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def keep_mass(shares: Tensor, mass: float) -> Tensor:
    """The fewest entries of each row whose sum reaches ``mass`` of the row's, at least one.

    >>> keep_mass(torch.tensor([0.2, 0.5, 0.3]), 0.6).tolist()
    [False, True, True]
    """
    largest, order = shares.sort(dim=-1, descending=True, stable=True)
    total = largest.cumsum(-1)
    chosen = total - largest < mass * total[..., -1:]
    chosen[..., 0] = True
    return torch.zeros_like(chosen).scatter_(-1, order, chosen)


def with_dense_text(video_map: Tensor, layout: BlockLayout, most: int | None = None) -> BlockSelection:
    """The lists of a map of the video blocks, with text blocks that attend to, and are attended by, everything.

    Args:
        video_map: bool ``[B, H, V, V]``.
        layout: tells how many text blocks there are.
        most: the most entries of a row, where it is known.
    """
    num_text_blocks = layout.num_blocks - layout.num_video_blocks
    if num_text_blocks:
        video_map = torch.nn.functional.pad(video_map, (0, num_text_blocks, 0, num_text_blocks), value=True)
        most = None
    return BlockSelection(*list_blocks(video_map.contiguous(), most), video_map)


def mask_of(selection: BlockSelection, inputs: AttentionInputs) -> BlockMask:
    """The block mask of a call for chosen blocks."""
    layout = inputs.layout
    mask = BlockMask(
        selection.kv_num_blocks, selection.kv_indices, layout.offsets, inputs.key_offsets, layout.block_size
    )
    mask.__dict__["block_map"] = selection.block_map  # spares the cached property its scatter
    return mask


def stack_maps(maps: list[Tensor], layout: BlockLayout) -> BlockSelection:
    """The lists of several maps ``[V, V]`` on the layout's device, one beside the other: ``[C, N, …]``.

    For masks that are made once and cached: it waits for the device.
    """
    stacked = torch.stack(maps)
    most = int(stacked.sum(-1).max())
    selection = with_dense_text(stacked[:, None].to(layout.offsets.device), layout, most)
    return BlockSelection(*(x[:, 0] for x in selection))


def shared_by_heads(stacked: BlockSelection) -> BlockSelection:
    """The first of stacked selections, for all items and heads."""
    return BlockSelection(*(x[:1, None] for x in stacked))


def pick(stacked: BlockSelection, choice: Tensor) -> BlockSelection:
    """Of stacked selections, the one that each item and head chose.

    Args:
        stacked: from `stack_maps`.
        choice: int64 ``[B, H]``.
    """
    return BlockSelection(*(x[choice] for x in stacked))
