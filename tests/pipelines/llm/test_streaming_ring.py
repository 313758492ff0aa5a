"""The ring that a full sink cache becomes, whatever interrupts it, and the kernel for sinks inside a model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from draftattn.errors import InputError
from draftattn.kernels import sink_merge
from draftattn.kernels.rotary import turn_angles, turn_pairs
from draftattn.pipelines.llm import SinkCache, apply
from draftattn.pipelines.llm.causal_masks import causal_mask
from draftattn.pipelines.llm.streaming_ring import Ring
from draftattn.pipelines.llm.streaming_rotary import RotaryTurn

SINK, WINDOW = 3, 9


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


class Operators(TorchDispatchMode):
    """Notes the operators that make or change a tensor; views do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not (func.is_view or "view" in func.name()):
            self.names.append(func.overloadpacket.__name__)
        return result


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("sink", "half"), [(3, 8), (3, 5), (0, 8)], ids=["whole heads", "part of heads", "no sinks"])
def test_a_ring_holds_turned_sinks_and_the_last_tokens(sink: int, half: int, dtype: torch.dtype, lm: Any) -> None:
    batch, heads, window, head_dim, steps = 2, 2, 5, 16, 17
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        torch.randn(2, batch, sink + window + steps, heads, head_dim, generator=generator)
        .to(dtype).to(lm.device).transpose(2, 3)
    )  # fmt: skip
    frequencies = torch.linspace(1, 0.01, half, dtype=torch.float64, device=lm.device)
    sinks, first = keys[:, :, :sink], sink + window
    ring = Ring.of(sinks, values[:, :, :sink], keys[:, :, sink:first], values[:, :, sink:first], half)
    storages = {x.data_ptr() for x in (ring.keys, ring.values)}
    for step in range(steps):
        own = first + step
        forgotten = torch.tensor([step, 1000 + step], device=lm.device)[:, None, None]
        angles = turn_angles(forgotten, frequencies, torch.float32)
        seen = ring.step(keys[:, :, own : own + 1], values[:, :, own : own + 1], *angles)
        exact = turn_pairs(sinks.float(), *angles)
        near = slice(own - window, own + 1)
        # both round once to the dtype
        limit = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(seen[0][:, :, :sink].float(), exact, rtol=limit, atol=limit)
        assert torch.equal(seen[1][:, :, :sink], values[:, :, :sink])
        for held, given in zip(seen, (keys, values), strict=True):
            assert held.shape[2] == sink + window + 1
            rows = {tuple(row.tolist()) for row in held[1, 1, sink:].float()}
            assert rows == {tuple(row.tolist()) for row in given[1, 1, near].float()}
        for held, given in zip(ring.window(), (keys, values), strict=True):
            assert torch.equal(held, given[:, :, own - window + 1 : own + 1])
    assert {x.data_ptr() for x in (ring.keys, ring.values)} == storages


@torch.no_grad()
def test_a_step_of_a_full_cache_moves_nothing(lm: SimpleNamespace) -> None:
    """Whatever the window, a layer takes two copies of one token and two operators for its sinks."""
    model = lm.model()
    cache = SinkCache(model, sink=SINK, window=WINDOW)
    for token in lm.ids(SINK + WINDOW + 1)[0]:
        model(token[None, None], past_key_values=cache)
    layer, kv = cache.layers[1], torch.randn(1, 2, 1, 16, device=lm.device)
    storage = layer._ring.keys.data_ptr()
    for _ in range(WINDOW + 3):
        cache.layers[0].update(kv, kv)  # makes the angles of this step
        with Operators() as operators:
            keys, _ = layer.update(kv, kv)
        assert sorted(operators.names) == ["addcmul", "copy_", "copy_", "mul"]
        assert keys.data_ptr() == storage
        assert keys.shape[2] == SINK + WINDOW + 1
    assert cache.num_held == SINK + WINDOW
    assert layer.get_mask_sizes(1)[0] == SINK + WINDOW + 1


def texts_of(lm: SimpleNamespace) -> tuple[list[Tensor], dict[str, Tensor]]:
    texts = [lm.ids(length, seed=length) for length in (48, 44)]
    return texts, lm.pad(texts, "left")


def exact_logits(model: Any, texts: list[Tensor]) -> list[tuple[Tensor, float]]:
    """Of every text alone, in one pass in float64, and twice what float32 loses."""
    exact = copy.deepcopy(model).double()
    found = []
    with torch.no_grad(), apply(exact, "streaming", sink=SINK, window=WINDOW):
        truths = [exact(text).logits for text in texts]
    with torch.no_grad(), apply(model, "streaming", sink=SINK, window=WINDOW):
        for text, truth in zip(texts, truths, strict=True):
            found.append((truth, 2 * rms(model(text).logits - truth)))
    return found


INTERRUPTIONS = ("nothing", "reading", "chunk", "copy", "reorder", "repeat", "inference", "gradient")


@pytest.mark.parametrize("what", INTERRUPTIONS)
@pytest.mark.parametrize("stock", [False, True], ids=["applied", "stock"])
def test_whatever_interrupts_the_ring(what: str, stock: bool, lm: SimpleNamespace) -> None:
    if stock and what == "chunk":
        return  # stock attention refuses it, see test_streaming.py
    model = lm.model()
    texts, batch = texts_of(lm)
    truths = exact_logits(model, texts)
    ids, positions = batch["input_ids"], batch["position_ids"]
    cache = SinkCache(model, sink=SINK, window=WINDOW, attention_mask=batch["attention_mask"][:, :5])
    logits: list[Tensor] = []

    def go_on(count: int, cache: SinkCache) -> SinkCache:
        start = sum(x.shape[1] for x in logits)
        part = slice(start, start + count)
        output = model(
            ids[:, part], position_ids=positions[:, part], past_key_values=cache, use_cache=True,
            attention_mask=batch["attention_mask"][:, : start + count],
        )  # fmt: skip
        logits.append(output.logits)
        return output.past_key_values

    def run(cache: SinkCache) -> None:
        with torch.no_grad():
            go_on(5, cache)
            while sum(x.shape[1] for x in logits) < 30:
                go_on(1, cache)
        assert all(layer._ring is not None for layer in cache.layers)
        for _ in range(3):
            if what == "reading":
                assert cache.layers[1].keys.shape == cache.layers[0].values.shape == (2, 2, WINDOW, 16)
            if what == "copy":
                cache = copy.deepcopy(cache)
            if what == "reorder":
                cache.reorder_cache(torch.tensor([1, 0]))
                cache.reorder_cache(torch.tensor([1, 0]))
            if what == "repeat":
                cache.batch_repeat_interleave(3)
                cache.batch_select_indices(torch.tensor([1, 4]))
            if what == "inference":
                with torch.inference_mode():
                    cache.reorder_cache(torch.tensor([0, 1]))
                    go_on(1, cache)
            if what == "gradient":
                go_on(1, cache)
                go_on(1, cache)
                (logits[-1].sum() + logits[-2].sum()).backward()
                assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
            with torch.no_grad():
                go_on(3 if what == "chunk" else 1, cache)
                go_on(1, cache)

    if stock:
        run(cache)
    else:
        with apply(model, "streaming", sink=SINK, window=WINDOW):
            run(cache)
    result = torch.cat(logits, 1)
    for item, (text, (truth, bound)) in enumerate(zip(texts, truths, strict=True)):
        padding = ids.shape[1] - text.shape[1]
        real = result[item : item + 1, padding:]
        assert rms(real - truth[:, : real.shape[1]]) <= bound


@torch.no_grad()
def test_a_model_through_the_kernel(lm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the tests of test_streaming.py run it too; here without one, in Triton's interpreter."""
    triton_sink_merge = pytest.importorskip("draftattn.kernels.triton_sink_merge")
    model = lm.model()
    texts, batch = texts_of(lm)
    truths = exact_logits(model, texts)
    calls = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args[2].shape[1])
        return triton_merge(*args, **options)

    triton_merge = triton_sink_merge.merge_sinks
    monkeypatch.setattr(triton_sink_merge, "merge_sinks", counted)
    monkeypatch.setattr(sink_merge, "triton_serves", lambda x: True)
    with apply(model, "streaming", sink=SINK, window=WINDOW):
        whole = model(use_cache=False, **batch).logits
        cache, parts, start = None, [], 0
        for count in (30, 11, 7):
            part = slice(start, start + count)
            start += count
            output = model(
                batch["input_ids"][:, part], position_ids=batch["position_ids"][:, part], past_key_values=cache,
                attention_mask=batch["attention_mask"][:, :start], use_cache=True,
            )  # fmt: skip
            cache = output.past_key_values
            parts.append(output.logits)
    assert calls == [48] * 2 + [30] * 2 + [11] * 2 + [7] * 2
    for logits in (whole, torch.cat(parts, 1)):
        for item, (text, (truth, bound)) in enumerate(zip(texts, truths, strict=True)):
            assert rms(logits[item : item + 1, -text.shape[1] :] - truth) <= bound


@torch.no_grad()
def test_layers_share_what_depends_on_lengths_only(lm: SimpleNamespace) -> None:
    model = lm.model(num_hidden_layers=3)
    with apply(model, "streaming", sink=SINK, window=WINDOW + 4):
        causal_mask.cache_clear()
        cache = model(lm.ids(40)).past_key_values
        assert (causal_mask.cache_info().misses, causal_mask.cache_info().hits) == (1, 2)
        for seed in range(3):
            model(lm.ids(6, seed), past_key_values=cache)
    assert causal_mask.cache_info().misses == 2


@torch.no_grad()
def test_prompts_about_as_long_as_what_a_token_sees(lm: SimpleNamespace) -> None:
    """Where plain causal attention serves, and where it no longer does."""
    model, ids = lm.model(), lm.ids(30)
    with apply(model, "streaming", sink=SINK, window=WINDOW):
        whole = model(ids, use_cache=False).logits
        for length in range(WINDOW, WINDOW + SINK + 4):
            torch.testing.assert_close(model(ids[:, :length]).logits, whole[:, :length], rtol=1e-4, atol=1e-4)


def test_training_after_inference_and_the_other_way_round(lm: SimpleNamespace) -> None:
    """What is kept from one pass to the next serves both."""
    model, ids = lm.model(), lm.ids(41)
    with apply(model, "streaming", sink=SINK, window=WINDOW):
        with torch.inference_mode():
            expected = model(ids, use_cache=False).logits.clone()
            cached = model(ids[:, :30], use_cache=True).past_key_values
        logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        assert torch.allclose(logits, expected, atol=1e-5)
        with torch.no_grad():
            steps = [model(token[None, None], past_key_values=cached).logits for token in ids[0, 30:]]
    assert torch.allclose(torch.cat(steps, 1), expected[:, 30:], atol=1e-4)


@torch.no_grad()
def test_another_batch_is_refused_before_anything_changes(lm: SimpleNamespace) -> None:
    model = lm.model()
    cache = SinkCache(model, sink=SINK, window=WINDOW)
    batch = lm.ids(2 * (SINK + WINDOW + 2)).view(2, -1)
    for count in (1, SINK + WINDOW + 1):  # the window grows; it is full, and a ring takes its place
        for token in batch[:, cache.get_seq_length() : count].T:
            model(token[:, None], past_key_values=cache)
        twin = copy.deepcopy(cache)
        for items in (batch[:1, :1], batch[:1, :2], torch.cat([batch, batch])[:, :1]):
            with pytest.raises(InputError, match="items and the cache is for 2; use a new cache"):
                model(items, past_key_values=cache)
        logits = [model(batch[:, -1:], past_key_values=x).logits for x in (cache, twin)]
        assert torch.equal(*logits)


def test_angles_of_one_position_are_not_mistaken_for_anothers() -> None:
    """Models that several threads run share them: what is kept may change between two lines."""

    class Busy(RotaryTurn):
        reads: Any = iter(())

        @property
        def _last(self) -> Any:
            return next(self.reads)

        @_last.setter
        def _last(self, value: Any) -> None:
            pass

    frequencies, like = torch.tensor([1.0, 0.1]), (torch.device("cpu"), torch.float32)
    turn, plain = Busy(frequencies), RotaryTurn(frequencies)
    mine, others = ((((position,), *like), plain.angles_of_items([position], *like)) for position in (5, 7))
    for reads in ([mine, mine, others], [mine, others, others], [others, mine, others]):
        turn.reads = iter(reads)
        for found, expected in zip(turn.angles_of_items([5], *like), mine[1], strict=True):
            assert torch.equal(found, expected)
