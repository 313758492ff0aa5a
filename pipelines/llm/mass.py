"""Choosing the fewest entries that hold a share of a distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def smallest_set(scores: Tensor, mass: float, forced: Tensor | None = None, min_kept: int = 0) -> Tensor:
    """The fewest entries of every row that hold at least a share of its sum.

    Forced entries come first and their mass counts; then the largest ones are added until the share is reached.
    Never waits for the device.

    Args:
        scores: ``[..., n]``, not negative.
        mass: the share, in (0, 1].
        forced: bool, broadcastable to ``scores``: entries kept whatever their score.
        min_kept: entries with a positive score that a row keeps at least.

    Returns:
        bool, the shape of ``scores``. Entries of score 0 are kept only if forced.

    >>> smallest_set(torch.tensor([0.1, 0.5, 0.3, 0.1]), 0.7).tolist()
    [False, True, True, False]
    """
    # forced entries before all others, in a value that still sorts the others among themselves
    order = scores if forced is None else scores.masked_fill(forced, torch.inf)
    order = order.argsort(dim=-1, descending=True, stable=True)
    sorted_scores = scores.gather(-1, order)
    before = sorted_scores.cumsum(-1) - sorted_scores
    kept = before < mass * scores.sum(-1, keepdim=True)
    kept |= torch.arange(scores.shape[-1], device=scores.device) < min_kept
    kept &= sorted_scores > 0
    chosen = torch.zeros_like(kept).scatter_(-1, order, kept)
    return chosen if forced is None else chosen | forced
