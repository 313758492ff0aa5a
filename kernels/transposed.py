"""A block mask's lists the other way round: for each key block, the query blocks that attend to it."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.block_mask import BlockMask


def transposed_lists(block_mask: BlockMask) -> tuple[Tensor, Tensor]:
    """For each key block, the query blocks that attend to it: FlexAttention's ``q_num_blocks`` and ``q_indices``.

    Built on the mask's device without a host sync, and kept with the mask; while torch.compile traces, built in the
    graph.

    Returns:
        int32 ``[B | 1, H | 1, K]`` counts, and int32 ``[B | 1, H | 1, K, Q]`` ids, ascending and left-packed.

    >>> offsets = torch.tensor([0, 100, 200, 230], dtype=torch.int32)
    >>> block_map = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    >>> counts, ids = transposed_lists(BlockMask.from_block_map(block_map[None, None], offsets, offsets))
    >>> counts.tolist(), ids[0, 0, 1, :2].tolist()
    ([[[2, 2, 3]]], [1, 2])
    """
    kept = block_mask.__dict__.get("transposed_lists")
    if kept is not None:
        return kept
    seen_by = block_map_of(block_mask).transpose(-1, -2)
    num_query_blocks = seen_by.shape[-1]
    rank = seen_by.cumsum(-1, dtype=torch.int32)
    # each chosen id moves to its rank, all others to a spare last slot
    slot = torch.where(seen_by, rank - 1, num_query_blocks).long()
    ids = torch.zeros(*seen_by.shape[:3], num_query_blocks + 1, dtype=torch.int32, device=seen_by.device)
    ids.scatter_(-1, slot, torch.arange(num_query_blocks, dtype=torch.int32, device=ids.device).expand_as(slot))
    lists = seen_by.sum(-1, dtype=torch.int32), ids[..., :-1].contiguous()
    if not torch.compiler.is_compiling():
        block_mask.__dict__["transposed_lists"] = lists
    return lists


def block_map_of(block_mask: BlockMask) -> Tensor:
    """The mask's ``block_map``, where torch.compile traces too: it cannot trace the lock of a cached property.

    >>> offsets = torch.tensor([0, 100, 200], dtype=torch.int32)
    >>> mask = BlockMask.from_block_map(torch.eye(2, dtype=torch.bool)[None, None], offsets, offsets)
    >>> block_map_of(mask).tolist()
    [[[[True, False], [False, True]]]]
    """
    if torch.compiler.is_compiling() and "block_map" not in block_mask.__dict__:
        return block_mask._map_of(block_mask._used)
    return block_mask.block_map
