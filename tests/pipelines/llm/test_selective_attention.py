"""Selective attention against its definition and x-transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.pipelines.llm import selective_attention as module
from draftattn.pipelines.llm.selective_attention import (
    SelectiveOutput,
    SelectiveState,
    fresh_state,
    selective_attention,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Draw = Callable[..., Tensor]


@pytest.fixture
def draw() -> Draw:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    return draw


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 7)


def literal(query: Tensor, key: Tensor, value: Tensor, head: int = 0, budget: int | None = None) -> Tensor:
    """The definition for one sequence, row by row, with a list of the keys that are still there."""
    length, heads, dim = query.shape
    group = heads // key.shape[1]
    out = torch.zeros_like(query)
    masked = query.new_zeros(length)
    present: list[int] = []
    for i in range(length):
        present.append(i)
        if budget is not None and len(present) > budget:
            present.remove(max(present[1:-1], key=lambda j: (masked[j].item(), -j)))
        logits = torch.stack([key[:, h // group] @ query[i, h] for h in range(heads)]) * dim**-0.5
        weights = (logits[:, present] - masked[present]).softmax(-1)
        out[i] = torch.stack([weights[h] @ value[present, h // group] for h in range(heads)])
        added = logits[head].relu()
        added[0] = 0.0
        added[i:] = 0.0
        masked = masked + added
    return out


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("budget", [None, 2, 5, 12, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "head"), [(4, 4, 0), (4, 2, 3), (6, 1, 1)], ids=str)
def test_equals_its_definition(draw: Draw, heads: int, kv_heads: int, head: int, budget: int | None) -> None:
    query, key, value = draw(2, 31, heads, 8), draw(2, 31, kv_heads, 8), draw(2, 31, kv_heads, 8)
    exact = torch.stack([literal(*x, head, budget) for x in zip(query, key, value, strict=True)])
    output = selective_attention(query, key, value, head=head, budget=budget).output
    torch.testing.assert_close(output, exact, rtol=1e-10, atol=1e-10)
    single = [x.float() for x in (query, key, value)]
    of_torch = torch.stack([literal(*x, head, budget) for x in zip(*single, strict=True)])
    output = selective_attention(*single, head=head, budget=budget).output
    assert relative_error(output, exact) <= 2 * relative_error(of_torch, exact) + 1e-6


def by_x_transformers(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Its function on the logits, in their precision; its module takes the softmax in float32."""
    attend = pytest.importorskip("x_transformers.attend")
    logits = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    masked = attend.selective_attn(logits.masked_fill(future, -torch.finfo(logits.dtype).max))
    return torch.einsum("bhij,bjhd->bihd", masked.softmax(-1), value)


@pytest.mark.usefixtures("small_chunks")
def test_equals_x_transformers(draw: Draw) -> None:
    arguments = [draw(2, 25, 4, 8).requires_grad_() for _ in range(3)]
    ours, theirs = selective_attention(*arguments, scale=0.3).output, by_x_transformers(*arguments, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weight = draw(2, 25, 4, 8)
    gradients = (torch.autograd.grad((output * weight).sum(), arguments) for output in (ours, theirs))
    for mine, their in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("small_chunks")
def test_errs_no_more_than_the_module_of_x_transformers(draw: Draw) -> None:
    attend = pytest.importorskip("x_transformers.attend").Attend(causal=True, selective=True, scale=0.3, heads=4)
    exact = [draw(2, 25, 4, 8) for _ in range(3)]
    single = [x.float() for x in exact]
    theirs, _ = attend.to(DEVICE)(*(x.transpose(1, 2) for x in single))
    truth = selective_attention(*exact, scale=0.3).output
    error = relative_error(selective_attention(*single, scale=0.3).output, truth)
    assert error <= 2 * relative_error(theirs.transpose(1, 2), truth)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("budget", [None, 4])
def test_gradients_are_those_of_differences(draw: Draw, budget: int | None) -> None:
    arguments = [draw(1, 9, heads, 4).requires_grad_() for heads in (4, 2, 2)]

    def run(*x: Tensor) -> Tensor:
        return selective_attention(*x, budget=budget).output

    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)


def step(
    query: Tensor, key: Tensor, value: Tensor, kept: SelectiveOutput, position: Tensor, budget: int | None
) -> SelectiveOutput:
    """One more token after what was kept; ``position`` maps kept keys to tokens."""
    second = torch.ones(len(query), 1, dtype=torch.long, device=query.device)
    new = fresh_state(len(query), 2, query.device, query.dtype).take(second)
    state = SelectiveState(*(torch.cat(x, 1) for x in zip(kept.state, new, strict=True)))
    item = torch.arange(len(query), device=query.device)[:, None]
    return selective_attention(query, key[item, position], value[item, position], state, budget=budget)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("budget", [None, 6])
def test_one_token_at_a_time_equals_all_at_once(draw: Draw, budget: int | None) -> None:
    query, key, value = draw(2, 30, 4, 8), draw(2, 30, 2, 8), draw(2, 30, 2, 8)
    whole = selective_attention(query, key, value, budget=budget).output
    result = selective_attention(query[:, :11], key[:, :11], value[:, :11], budget=budget)
    torch.testing.assert_close(result.output, whole[:, :11], rtol=1e-10, atol=1e-10)
    position = torch.arange(11, device=DEVICE).expand(2, -1) if result.kept is None else result.kept
    for i in range(11, 30):
        position = torch.cat([position, torch.full((2, 1), i, device=DEVICE)], 1)
        result = step(query[:, i : i + 1], key, value, result, position, budget)
        torch.testing.assert_close(result.output, whole[:, i : i + 1], rtol=1e-10, atol=1e-10)
        if result.kept is not None:
            position = position.gather(1, result.kept)
            assert position.shape[1] == budget
            assert (position[:, 0] == 0).all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("budget", [None, 6])
def test_padding_is_never_seen_and_masks_nothing(draw: Draw, budget: int | None) -> None:
    lengths, total = (19, 30, 4), 30
    query, key, value = draw(3, 30, 4, 8), draw(3, 30, 2, 8), draw(3, 30, 2, 8)
    token = torch.arange(total, device=DEVICE)
    starts = torch.tensor([total - length for length in lengths], device=DEVICE)[:, None]
    state = fresh_state(3, total, DEVICE)._replace(alive=token >= starts, first=token == starts)
    poisoned = [torch.where(state.alive[..., None, None], x, 1e3) for x in (query, key, value)]
    output = selective_attention(*poisoned, state, budget=budget).output
    for item, length in enumerate(lengths):
        alone = (x[item : item + 1, total - length :] for x in (query, key, value))
        torch.testing.assert_close(
            output[item, total - length :], selective_attention(*alone, budget=budget).output[0], rtol=1e-10, atol=1e-10
        )
        assert not output[item, : total - length].any()


def test_a_smaller_budget_than_before_drops_the_most_masked(draw: Draw) -> None:
    query, key, value = draw(1, 20, 2, 8), draw(1, 20, 2, 8), draw(1, 20, 2, 8)
    first = selective_attention(query, key, value)
    result = step(
        query[:, :1],
        torch.cat([key, key], 1),
        torch.cat([value, value], 1),
        first,
        torch.arange(21, device=DEVICE)[None],
        5,
    )
    assert result.kept is not None
    # four of the twenty, one of which makes room for the new one
    order = first.state.masked[0].argsort(stable=True).tolist()
    assert set(result.kept[0].tolist()) <= {0, 20, *order[:5]}
    assert result.kept.shape == (1, 5)


def test_memory_does_not_hold_all_weights_for_the_gradient(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ROWS", 16)
    arguments = [draw(1, 256, 2, 4).requires_grad_() for _ in range(3)]
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        selective_attention(*arguments)
    assert max(saved) < 256 * 256 // 8


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(head=4), "head is 4"), (dict(head=-1), "head is -1"), (dict(budget=1), "budget is 1")],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_refusals(draw: Draw, options: dict[str, int], words: str) -> None:
    query, key, value = draw(3, 1, 5, 4, 8).unbind()
    with pytest.raises(InputError, match=words):
        selective_attention(query, key, value, **options)
    with pytest.raises(InputError, match="need the state"):
        selective_attention(query[:, 1:], key, value)
