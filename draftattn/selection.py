"""Which entries of a draft map are kept.

Both rules run on the map's device without a host sync, for every batch item and head alone.
"""

from __future__ import annotations

import math

from torch import Tensor

from draftattn.kernels.selection import select_from_rank, select_largest


def blocks_kept_per_row(num_blocks: int, sparsity: float) -> int:
    """Blocks a row keeps under per-row selection: the share ``1 - sparsity``, rounded up, at least one.

    >>> blocks_kept_per_row(36, 0.75), blocks_kept_per_row(36, 0.9)
    (9, 4)
    """
    return max(1, math.ceil((1 - sparsity) * num_blocks - 1e-9))


def select_per_row(draft: Tensor, sparsity: float) -> Tensor:
    """Keeps the largest entries of every row, its own block always among them; of equal entries the first.

    Args:
        draft: ``[B, H, V, V]``.
        sparsity: share of entries dropped, in [0, 1).

    Returns:
        bool ``[B, H, V, V]`` with exactly `blocks_kept_per_row` entries in each row.

    >>> import torch
    >>> select_per_row(torch.tensor([[[[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5]]]]), 0.5).int()[0, 0].tolist()
    [[1, 1, 0], [1, 1, 0], [0, 1, 1]]
    """
    return select_largest(draft, blocks_kept_per_row(draft.shape[-1], sparsity), keep_diagonal=True).block_map


def entries_dropped_per_head(num_blocks: int, sparsity: float) -> int:
    """Rank of the threshold of per-head selection among the entries of a head: ``floor(sparsity · V²)``.

    >>> entries_dropped_per_head(36, 0.75), entries_dropped_per_head(3, 0.1)
    (972, 0)
    """
    return int(sparsity * (num_blocks * num_blocks))


def select_per_head(draft: Tensor, sparsity: float) -> Tensor:
    """The published rule: one threshold over the flattened map of a head.

    The threshold is the ``floor(sparsity · V²)``-th smallest entry, and everything at or above it is kept, as in the
    reference code of DraftAttention (arXiv 2505.14708). A row that would keep nothing keeps its largest entry: the
    published code leaves such rows empty and their output zero.

    Args:
        draft: ``[B, H, V, V]``.
        sparsity: share of entries dropped, in [0, 1).

    Returns:
        bool ``[B, H, V, V]``; no row is empty.
    """
    return select_from_rank(draft, entries_dropped_per_head(draft.shape[-1], sparsity)).block_map
