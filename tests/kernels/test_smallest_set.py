"""The fewest entries that hold a share, against the rule written as a loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from draftattn.kernels import smallest_set as module
from draftattn.kernels.backends import triton_interpreted
from draftattn.kernels.smallest_set import smallest_set

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton", "triton-long-rows"])
def chosen_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """The public function, through either implementation."""
    if request.param != "torch":
        pytest.importorskip("triton")
        if not (DEVICE.type == "cuda" or triton_interpreted()):
            pytest.skip("Triton needs a GPU or its interpreter")
        from draftattn.kernels import triton_smallest_set

        if request.param == "triton-long-rows":
            monkeypatch.setattr(triton_smallest_set, "_MAX_COLUMNS", 0)
            monkeypatch.setattr(triton_smallest_set, "_CHUNK", 32)
    monkeypatch.setattr(module, "_kernel_serves", lambda *_: request.param != "torch")
    return smallest_set


def literal(scores: Tensor, mass: float, forced: Tensor | None, min_kept: int) -> Tensor:
    forced = torch.zeros_like(scores, dtype=torch.bool) if forced is None else forced.expand(scores.shape)
    rows = []
    for row, kept in zip(*(x.reshape(-1, x.shape[-1]).tolist() for x in (scores, forced)), strict=True):
        target, kept = mass * sum(row), list(kept)
        for i in sorted(range(len(row)), key=lambda i: -row[i]):
            enough = sum(x for x, chosen in zip(row, kept, strict=True) if chosen) >= target
            if (enough and sum(kept) >= min_kept) or row[i] == 0:
                break
            kept[i] = True
        rows.append(kept)
    return torch.tensor(rows, device=DEVICE).view(scores.shape)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("shape", "which", "mass", "min_kept"),
    [
        ((2, 2, 2, 37), "shared", 0.75, 0),
        ((2, 1, 2, 37), "all", 0.25, 4),
        ((3, 40), "all", 0.1, 15),
        ((2, 64), "none", 1.0, 0),
        ((33,), "none", 0.25, 0),
        ((1,), "none", 0.5, 3),
    ],
    ids=str,
)
def test_values(
    chosen_by: Callable[..., Tensor], shape: tuple[int, ...], which: str, mass: float, min_kept: int
) -> None:
    # whole numbers: sums are exact, and many scores are equal or 0
    generator = torch.Generator().manual_seed(len(shape))
    scores = torch.randint(0, 9, shape, generator=generator).float().to(DEVICE)
    scores = torch.where(scores == 0, -0.0, scores)
    forced = None
    if which != "none":
        own = (1,) * (len(shape) - 1) + shape[-1:] if which == "shared" else shape
        forced = (torch.rand(own, generator=generator) < 0.2).to(DEVICE)
    found = chosen_by(scores, mass, forced, min_kept)
    assert torch.equal(found, literal(scores, mass, forced, min_kept))


def test_real_shares_of_any_strides(chosen_by: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    scores = (torch.randn(1, 2, 50, 3, device=DEVICE) * 4).softmax(-2).transpose(2, 3)
    forced = (torch.arange(50, device=DEVICE) == torch.arange(3, device=DEVICE)[:, None]).T.contiguous().T
    kept = chosen_by(scores, 0.9, forced)
    held = scores.double().where(kept, 0.0)
    least = held.where(kept & ~forced, torch.inf).amin(-1)
    assert bool((held.sum(-1) >= 0.9 * scores.double().sum(-1) - 1e-6).all())
    assert bool(((held.sum(-1) - least <= 0.9 + 1e-6) | (least == torch.inf)).all())
    assert bool((kept >= forced).all())
    left_out = scores.double().where(~kept, 0.0).amax(-1)
    assert bool((left_out <= least).all())
