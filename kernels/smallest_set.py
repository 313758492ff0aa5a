"""The fewest entries of a row that hold a share of its sum."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.dispatch import triton_serves


def smallest_set(scores: Tensor, mass: float, forced: Tensor | None = None, min_kept: int = 0) -> Tensor:
    """The fewest entries of every row that hold at least a share of its sum; of equal ones the first.

    Forced entries come first and their mass counts; then the largest ones are added until the share is reached.
    Never waits for the device.

    Args:
        scores: ``[..., n]`` of at most four dimensions, not negative.
        mass: the share, in (0, 1].
        forced: bool, broadcastable to ``scores``: entries kept whatever their score.
        min_kept: entries that a row keeps at least, as far as so many have a positive score or are forced.

    Returns:
        bool, the shape of ``scores``. Entries of score 0 are kept only if forced.

    >>> smallest_set(torch.tensor([0.1, 0.5, 0.3, 0.1]), 0.7).tolist()
    [False, True, True, False]
    """
    if not _kernel_serves(scores):
        return smallest_set_reference(scores, mass, forced, min_kept)
    from draftattn.kernels import triton_smallest_set

    return triton_smallest_set.smallest_set(scores, mass, forced, min_kept)


def smallest_set_reference(scores: Tensor, mass: float, forced: Tensor | None = None, min_kept: int = 0) -> Tensor:
    """``smallest_set`` in plain torch."""
    if forced is None:
        sorted_scores, order = scores.sort(dim=-1, descending=True, stable=True)
    else:
        # forced entries before all others, in a value that still sorts the others among themselves
        order = scores.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)
        sorted_scores = scores.gather(-1, order)
    before = sorted_scores.cumsum(-1) - sorted_scores
    kept = before < mass * scores.sum(-1, keepdim=True)
    if min_kept:
        kept[..., :min_kept] = True
    kept &= sorted_scores > 0
    chosen = torch.zeros_like(kept).scatter_(-1, order, kept)
    return chosen if forced is None else chosen | forced


def _kernel_serves(scores: Tensor) -> bool:
    return triton_serves(scores) and scores.dtype == torch.float32 and scores.ndim <= 4
