"""From a gate's scores to blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def select_by_threshold(scores: Tensor, visible: Tensor, own: Tensor, threshold: float, dense_tail: int = 0) -> Tensor:
    """Blocks to which the gate gives more than a share of a row's attention.

    Args:
        scores: ``[B, H, Q, K]``, as `draftattn.pipelines.llm.seer_gate.SeerGate` gives them.
        visible: bool ``[1, 1, Q, K]``, blocks with a key that the row may see.
        own: bool ``[1, 1, Q, K]``, the block that a row stands in; it is kept whatever its score.
        threshold: the share; 5e-4 and 2e-3 are published, for retrieval and for long documents.
        dense_tail: last rows that keep all that they may see.

    Returns:
        bool ``[B, H, Q, K]``.

    >>> scores = torch.tensor([[1.0, 9.0, 0.0], [3.0, 0.0, 0.0], [5.0, 0.0, 5.0]])[None, None]
    >>> visible, own = torch.ones(1, 1, 3, 3).tril().bool(), torch.eye(3).bool()[None, None]
    >>> select_by_threshold(scores, visible, own, 0.1)[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    kept = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) > threshold
    return _with_tail(kept | own, visible, dense_tail)


def select_by_ratio(scores: Tensor, visible: Tensor, own: Tensor, ratio: float, dense_tail: int = 0) -> Tensor:
    """A share of the blocks that a row may see, at least one: its own, then those of the largest scores.

    Args:
        scores: see `select_by_threshold`.
        visible: see `select_by_threshold`.
        own: see `select_by_threshold`.
        ratio: the share, rounded up to whole blocks.
        dense_tail: see `select_by_threshold`.

    Returns:
        bool ``[B, H, Q, K]``; with equal scores at the edge a row keeps all of them.

    >>> scores = torch.tensor([[1.0, 9.0, 0.0], [3.0, 0.0, 0.0], [5.0, 0.0, 4.0]])[None, None]
    >>> visible, own = torch.ones(1, 1, 3, 3).tril().bool(), torch.eye(3).bool()[None, None]
    >>> select_by_ratio(scores, visible, own, 0.5)[0, 0].int().tolist()
    [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    """
    num_visible = visible.sum(-1, keepdim=True)
    # in float64, or 0.1 of 30 blocks would be 4
    num_kept = (num_visible.double() * ratio - 1e-9).ceil().long().clamp(min=1)
    ranked = scores.masked_fill(~visible, -torch.inf).masked_fill(own, torch.inf)
    most = max(1, math.ceil(ranked.shape[-1] * ratio))
    largest = ranked.topk(min(most, ranked.shape[-1]), dim=-1).values
    edge = largest.gather(-1, (num_kept - 1).clamp(max=largest.shape[-1] - 1).expand(*largest.shape[:-1], 1))
    return _with_tail((ranked >= edge) & visible, visible, dense_tail)


def _with_tail(kept: Tensor, visible: Tensor, dense_tail: int) -> Tensor:
    kept = kept & visible
    if dense_tail:
        kept[..., -dense_tail:, :] = visible[..., -dense_tail:, :]
    return kept
