"""Selective attention inside models of transformers, and its pruned cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from draftattn.errors import InputError
from draftattn.pipelines.llm import apply, remove
from draftattn.pipelines.llm.selective import SelectiveCache, SelectiveConfig
from draftattn.pipelines.llm.selective_attention import selective_attention
from draftattn.pipelines.llm.selective_cache import SelectiveLayer

EXACT: dict[str, Any] = dict(rtol=1e-8, atol=1e-8)  # in float64
CASES = [("llama", {}), ("qwen2", dict(head=3)), ("qwen3", dict(budget=12)), ("mistral", dict(budget=(9, None)))]


@pytest.mark.parametrize(("family", "options"), CASES)
@torch.no_grad()
def test_cached_decoding_equals_one_pass(lm: SimpleNamespace, family: str, options: dict[str, Any]) -> None:
    model, ids = lm.model(family).double(), lm.ids(50)
    dense = model(ids).logits
    apply(model, "selective", **options)
    whole = model(ids, use_cache=False).logits
    assert (whole - dense).abs().max() > 0.1
    cache = DynamicCache(config=model.config)
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([21, 13, *[1] * 16], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    assert cache.get_seq_length() == 50
    budgets = {"qwen3": (12, 12), "mistral": (9, 50)}.get(family, (50, 50))
    assert tuple(layer.keys.shape[2] for layer in cache.layers) == budgets
    remove(model)
    assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("budget", [None, 12])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_items_get_what_they_get_alone(lm: SimpleNamespace, side: str, budget: int | None) -> None:
    model = lm.model().double()
    apply(model, "selective", budget=budget)
    sequences = [lm.ids(length, seed=length) for length in (41, 20, 3)]
    batch = lm.pad(sequences, side)
    for row, sequence in zip(lm.real_rows(batch, model(**batch).logits), sequences, strict=True):
        torch.testing.assert_close(row, model(sequence).logits, **EXACT)


@pytest.mark.parametrize("budget", [None, 12])
@torch.no_grad()
def test_generation_of_a_padded_batch(lm: SimpleNamespace, budget: int | None) -> None:
    model = lm.model().double()
    apply(model, "selective", budget=budget)
    sequences = [lm.ids(length, seed=length) for length in (30, 19)]
    batch = lm.pad(sequences, "left")
    options: dict[str, Any] = dict(max_new_tokens=10, min_new_tokens=10)
    together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, **options)
    for row, sequence in zip(together, sequences, strict=True):
        mask = torch.ones_like(sequence)
        alone = model.generate(sequence, attention_mask=mask, do_sample=False, use_cache=False, **options)
        assert torch.equal(row[30:], alone[0, sequence.shape[1] :])
    beams = [
        model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=2, use_cache=use_cache, **options
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


@torch.no_grad()
def test_a_cache_brings_its_own_budget_and_stays_small(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(70)
    apply(model, "selective")
    cache = SelectiveCache(model, budget=[16, 8])
    text = model.generate(ids, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert text.shape == (1, 90)
    assert cache.get_seq_length() == 89
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(1, 2, 16, 16), (1, 2, 8, 16)]
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * layer.keys.element_size()
    apply(model, "selective", budget=(16, 8))
    again = model.generate(ids, use_cache=False, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert torch.equal(text, again)


def test_a_model_trains_with_it(lm: SimpleNamespace) -> None:
    model, ids = lm.model().train(), lm.ids(40)
    apply(model, "selective")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_the_layer_attends_as_the_function_does(lm: SimpleNamespace) -> None:
    model = lm.model()
    handle = apply(model, "selective", budget=7, head=1)
    query, key, value = (torch.randn(2, heads, 15, 16, device=lm.device) for heads in (4, 2, 2))
    ranges = handle.system.mask(dict(batch_size=2, q_length=15, kv_length=15))
    module = model.model.layers[0].self_attn
    handle.system.caches.clear()
    output = handle.system.forward(module, query, key, value, ranges, 0.25, None)
    expected = selective_attention(*(x.transpose(1, 2) for x in (query, key, value)), head=1, budget=7, scale=0.25)
    assert torch.equal(output, expected.output)


@torch.no_grad()
def test_density_is_what_a_budget_leaves(lm: SimpleNamespace) -> None:
    model = lm.model()
    recorder = apply(model, "selective", budget=4).record_density()
    cache = DynamicCache(config=model.config)
    for part in lm.ids(10).split([7, 1, 2], 1):
        model(part, past_key_values=cache)
    assert recorder.density() == pytest.approx(sum(min(t + 1, 4) for t in range(10)) / 55)


@torch.no_grad()
def test_refusals(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(8)
    cache = SelectiveCache(model, budget=4)
    model(ids, past_key_values=cache)
    with pytest.raises(InputError, match='apply\\(model, "selective"\\) first'):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(InputError, match="layers have query heads 0 to 3"):
        apply(model, "selective", head=4)
    with pytest.raises(InputError, match="layer 1 has none"):
        apply(model, "selective", budget=(4,))
    with pytest.raises(InputError, match="model is a LlamaConfig; it must be a model"):
        SelectiveCache(model.config, budget=4)  # type: ignore[arg-type]
    for options, words in ((dict(budget=1), "budget is 1"), (dict(dense_len=9), "dense_len is 9")):
        with pytest.raises(InputError, match=words):
            SelectiveConfig(**options)
    apply(model, "selective")
    static = StaticCache(config=model.config, max_cache_len=16)
    model(ids, past_key_values=static)
    with pytest.raises(InputError, match="StaticLayer"):
        model(ids[:, :1], past_key_values=static)
    with pytest.raises(InputError, match="gaps"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]], device=ids.device))
    layer = SelectiveLayer()
    with pytest.raises(InputError, match="cannot give tokens back"):
        layer.crop(-1)
