"""Scores that rows share a budget by, against loops in float64."""

import math

import pytest
import torch

from draftattn.kernels.causal_budget import budget_scores, budget_scores_reference


def literal(scores, first):
    expected = torch.full(scores.shape, -math.inf, dtype=torch.float64)
    columns = scores.shape[-1]
    for item, of_item in enumerate(scores.double().cpu().tolist()):
        for head, of_head in enumerate(of_item):
            for row, values in enumerate(of_head):
                own = first + row
                seen = torch.tensor(values[: own + 1], dtype=torch.float64)
                log_p = seen - seen.logsumexp(0)
                free = [j for j in range(own) if j]
                for j in range(min(own + 1, columns)):
                    if j in (0, own):
                        expected[item, head, row, j] = math.inf
                    else:
                        expected[item, head, row, j] = log_p[j] - max(log_p[k] for k in free) / 2
    return expected


@pytest.fixture(params=["plain", "dispatched", "triton"])
def function(request):
    if request.param == "plain":
        return budget_scores_reference
    if request.param == "dispatched":
        return budget_scores
    pytest.importorskip("triton")
    from draftattn.kernels import triton_causal_budget

    return triton_causal_budget.budget_scores


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("rows", "columns", "first"), [(1, 1, 0), (2, 2, 0), (9, 9, 0), (3, 20, 17), (4, 21, 16)])
def test_values(function, rows, columns, first, device):
    scores = 4 * torch.randn(2, 3, rows, columns, device=device)
    scores[..., 0] += 30  # a sink that holds nearly everything
    if rows > 3:
        scores[0, 1, 3, 1:] -= 400  # and one that holds all
    hidden = torch.arange(columns, device=device) > first + torch.arange(rows, device=device)[:, None]
    torch.testing.assert_close(
        function(scores.masked_fill(hidden, torch.nan), first).double().cpu(),
        literal(scores, first),
        rtol=1e-5,
        atol=1e-5,
    )


def test_strided_scores(function, device):
    scores = torch.randn(1, 6, 4, 6, device=device)
    expected = function(scores.transpose(1, 3).contiguous(), 0)
    torch.testing.assert_close(function(scores.transpose(1, 3), 0), expected, rtol=0, atol=0)


def test_what_is_refused():
    scores = torch.zeros(1, 1, 3, 5)
    with pytest.raises(ValueError, match="first is 3; 3 rows in 5 columns may begin at 0 to 2"):
        budget_scores(scores, 3)
    with pytest.raises(ValueError, match="float32"):
        budget_scores(scores.double(), 0)
