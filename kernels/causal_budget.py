"""Scores of block pairs that many rows and heads of a causal call can share one budget by."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.dispatch import triton_serves

_MAX_COLUMNS = 16_384  # of a row that a program holds in registers


def budget_scores(scores: Tensor, first: int) -> Tensor:
    r"""Makes scores of key blocks comparable between rows: what they can be ranked by across all rows and heads.

    With :math:`p_{ij}` the softmax of the scores over the blocks that row ``i`` sees, the result is
    :math:`\log p_{ij} - \frac{1}{2} \log \max_j p_{ij}`, the maximum over blocks that are not kept in any case. By
    :math:`\log p` alone, rows whose few best blocks hold everything would get nearly nothing, for estimates of
    :math:`p` from means are too sure of themselves; by the ratio to a row's best all rows would get about as much.
    Not differentiable.

    Args:
        scores: float32 ``[B, H, Q, K]``; row ``i`` sees the blocks up to its own, ``first + i``.
        first: the own block of the first row.

    Returns:
        float32 ``[B, H, Q, K]``: infinity for the first block and the own one, which are kept in any case, ``-inf`` for
        blocks after it.

    Raises:
        ValueError: if the rows' own blocks are not all among the columns.

    >>> [[f"{x:.2f}" for x in row] for row in budget_scores(torch.zeros(1, 1, 4, 4), 0)[0, 0, 1:].exp()]
    [['inf', 'inf', '0.00', '0.00'], ['inf', '0.58', 'inf', '0.00'], ['inf', '0.50', '0.50', 'inf']]
    """
    if scores.ndim != 4 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32 [B, H, Q, K]; got {scores.dtype} {list(scores.shape)}")
    rows, columns = scores.shape[-2:]
    if not 0 <= first <= columns - rows:
        raise ValueError(f"first is {first}; {rows} rows in {columns} columns may begin at 0 to {columns - rows}")
    scores = scores.detach()
    if not triton_serves(scores) or columns > _MAX_COLUMNS:
        return budget_scores_reference(scores, first)
    from draftattn.kernels import triton_causal_budget

    return triton_causal_budget.budget_scores(scores, first)


def budget_scores_reference(scores: Tensor, first: int) -> Tensor:
    """``budget_scores`` in plain torch."""
    rows, columns = scores.shape[-2:]
    column = torch.arange(columns, device=scores.device)
    own = first + torch.arange(rows, device=scores.device)[:, None]
    forced = (column == 0) | (column == own)
    seen = scores.masked_fill(column > own, -torch.inf)
    best = seen.masked_fill(forced, -torch.inf).amax(-1, keepdim=True)
    level = (seen.logsumexp(-1, keepdim=True) + best) / 2
    # a row without a choice has no best block
    return (seen - level.masked_fill(best == -torch.inf, 0.0)).masked_fill(forced, torch.inf)
