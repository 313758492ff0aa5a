"""What systems keep beside a cache: used while the cache is what they left, made again after anything else."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from draftattn.pipelines.llm import apply, remove
from draftattn.pipelines.llm.infllm_keys import CompressedWindows, compressed_keys
from draftattn.pipelines.llm.seer_gate import GateShape, SeerGate
from draftattn.pipelines.llm.seer_keys import PreRotary
from draftattn.pipelines.llm.seer_weights import GateSet, save_gates

STRIDE, LAYERS = 4, 2
INFLLM = {"block_size": 16, "top_k": 3, "local_tokens": 16, "window": 8, "stride": STRIDE, "dense_len": 0}
PROMPT, ROOM = 70, 110


def make_cache(model: Any, kind: str) -> Any:
    return DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=ROOM)


@torch.no_grad()
def run(model: Any, ids: Tensor, cache: Any, **more: Any) -> Tensor:
    return model(ids, past_key_values=cache, use_cache=True, **more).logits


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys every making of compressed keys reads."""
    lengths: list[int] = []

    def counting(key: Tensor, stride: int) -> Tensor:
        lengths.append(key.shape[1])
        return compressed_keys(key, stride)

    for module in ("infllm", "infllm_keys"):
        monkeypatch.setattr(f"draftattn.pipelines.llm.{module}.compressed_keys", counting)
    return lengths


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_reads_only_the_keys_of_new_windows(lm: SimpleNamespace, read: list[int], kind: str) -> None:
    model, ids = lm.model(), lm.ids(90)
    apply(model, "infllm", **INFLLM)
    cache = make_cache(model, kind)
    run(model, ids[:, :PROMPT], cache)
    assert read == [PROMPT] * LAYERS
    read.clear()
    for position in range(PROMPT, 90):
        run(model, ids[:, position : position + 1], cache)
    assert read == [2 * STRIDE] * LAYERS * (90 // STRIDE - PROMPT // STRIDE)


@pytest.mark.parametrize("side", ["left", "none"])
def test_caches_in_turn_keep_their_own(lm: SimpleNamespace, read: list[int], side: str) -> None:
    """Of a padded batch each group of items."""
    model = lm.model()
    texts = [lm.ids(PROMPT, seed) for seed in range(4)] if side == "none" else [lm.ids(70), lm.ids(50), lm.ids(70, 1)]
    batches = [(text, None) for text in texts]
    if side == "left":
        padded = lm.pad(texts, "left")
        batches = [(padded["input_ids"], padded["attention_mask"]), (lm.ids(61, 7), None)]
    apply(model, "infllm", **INFLLM)
    caches, masks = [DynamicCache() for _ in batches], [mask for _, mask in batches]
    for (ids, mask), cache in zip(batches, caches, strict=True):
        run(model, ids, cache, attention_mask=mask)
    read.clear()
    for step in range(6):
        for i, cache in enumerate(caches):
            ids = lm.ids(len(batches[i][0]), seed=100 * step + i).T
            masks[i] = None if masks[i] is None else torch.nn.functional.pad(masks[i], (0, 1), value=1)
            positions = {} if masks[i] is None else {"position_ids": masks[i].sum(1, keepdim=True) - 1}
            expected_of = copy.deepcopy(cache)
            ours = run(model, ids, cache, attention_mask=masks[i], **positions)
            assert all(length <= 2 * STRIDE for length in read)
            # a copied cache has nothing beside it
            expected = run(model, ids, expected_of, attention_mask=masks[i], **positions)
            assert max(read) > 2 * STRIDE
            read.clear()
            assert torch.allclose(ours, expected, atol=1e-5)


def reorder(model: Any, cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0], device=model.device))


def crop(model: Any, cache: Any) -> None:
    keys = cache.layers[0].keys.shape[2]
    for layer in cache.layers:
        layer.keys, layer.values = (x[:, :, : keys - 1] for x in (layer.keys, layer.values))
        layer.keys, layer.values = (torch.cat([x, x[:, :, :1]], 2) for x in (layer.keys, layer.values))


def change_in_place(model: Any, cache: Any) -> None:
    for layer in cache.layers:
        layer.keys.mul_(-1)


def fill_densely(model: Any, cache: Any) -> None:
    """Other keys at the same places, while the system is away."""
    remove(model)
    change_in_place(model, cache)
    apply(model, "infllm", **INFLLM)


DISTURBANCES: list[tuple[str, Callable[[Any, Any], None]]] = [
    ("dynamic", reorder), ("dynamic", crop), ("dynamic", change_in_place), ("dynamic", fill_densely),
    ("static", reorder), ("static", change_in_place), ("static", fill_densely),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "disturb"), DISTURBANCES, ids=[f"{k}-{d.__name__}" for k, d in DISTURBANCES])
def test_a_changed_cache_is_read_again(
    lm: SimpleNamespace, read: list[int], kind: str, disturb: Callable[[Any, Any], None]
) -> None:
    model = lm.model()
    ids = torch.cat([lm.ids(PROMPT + 5, 1), lm.ids(PROMPT + 5, 2)])
    apply(model, "infllm", **INFLLM)
    cache = make_cache(model, kind)
    run(model, ids[:, :PROMPT], cache)
    run(model, ids[:, PROMPT : PROMPT + 1], cache)
    undisturbed = run(model, ids[:, PROMPT + 1 : PROMPT + 2], copy.deepcopy(cache))
    disturb(model, cache)
    fresh = copy.deepcopy(cache)
    read.clear()
    ours = run(model, ids[:, PROMPT + 1 : PROMPT + 2], cache)
    assert read == [PROMPT + 2] * LAYERS
    assert torch.allclose(ours, run(model, ids[:, PROMPT + 1 : PROMPT + 2], fresh), atol=1e-5)
    assert not torch.allclose(ours, undisturbed, atol=1e-3)


def test_a_static_cache_serves_another_text_after_a_reset(lm: SimpleNamespace, read: list[int]) -> None:
    """With a first part that stays dense, so that the system meets the new text when it is as long as the old was."""
    model, first, second = lm.model(), lm.ids(PROMPT, 1), lm.ids(PROMPT, 2)
    handle, cache = apply(model, "infllm", **INFLLM), make_cache(model, "static")
    run(model, first, cache)
    cache.reset()
    handle.system.config = dataclasses.replace(handle.system.config, dense_len=PROMPT)
    with pytest.warns(UserWarning, match="stay dense"):
        run(model, second, cache)
    read.clear()
    token, other = lm.ids(1, 3), copy.deepcopy(cache)
    assert torch.allclose(run(model, token, cache), run(model, token, other), atol=1e-5)
    assert read == [PROMPT + 1] * 2 * LAYERS


def test_a_call_that_is_not_served_forgets(lm: SimpleNamespace, read: list[int]) -> None:
    """Its keys would be missing."""
    model, ids = lm.model(), lm.ids(PROMPT)
    handle = apply(model, "infllm", **INFLLM)
    cache = DynamicCache()
    run(model, ids, cache)
    serves, handle.system.serves = handle.system.serves, lambda call: False  # type: ignore[method-assign]
    run(model, lm.ids(1, 1), cache)
    handle.system.serves = serves  # type: ignore[method-assign]
    read.clear()
    run(model, lm.ids(1, 2), cache)
    assert read == [PROMPT + 2] * LAYERS


def test_tokens_hidden_later_are_left_out(lm: SimpleNamespace, read: list[int]) -> None:
    """An attention_mask that begins after the prompt: what was kept is of other keys."""
    model, ids = lm.model(), torch.cat([lm.ids(PROMPT, 1), lm.ids(PROMPT, 2)])
    apply(model, "infllm", **INFLLM)
    cache = DynamicCache()
    run(model, ids, cache)
    mask = torch.ones(2, PROMPT + 1, dtype=torch.long, device=model.device)
    mask[:, :5] = 0
    token, other = lm.ids(2, 3).T, copy.deepcopy(cache)
    read.clear()
    ours = run(model, token, cache, attention_mask=mask)
    assert read == [PROMPT - 4] * LAYERS
    assert torch.allclose(ours, run(model, token, other, attention_mask=mask), atol=1e-5)


def test_inference_mode_may_begin_and_end_between_steps(lm: SimpleNamespace, read: list[int]) -> None:
    model, ids = lm.model(), lm.ids(PROMPT + 12)
    apply(model, "infllm", **INFLLM)
    cache, plain = DynamicCache(), DynamicCache()
    run(model, ids[:, :PROMPT], plain)
    with torch.inference_mode():
        run(model, ids[:, :PROMPT], cache)
    read.clear()
    for position in range(PROMPT, PROMPT + 12):
        token = ids[:, position : position + 1]
        with torch.inference_mode(position % 8 < 4):
            ours = run(model, token, cache)
        assert torch.allclose(ours, run(model, token, plain), atol=1e-5)
    assert max(read) == 2 * STRIDE


def test_a_compiled_layer_keeps_its_windows(lm: SimpleNamespace, read: list[int]) -> None:
    model, ids = lm.model(), lm.ids(PROMPT + 3)
    apply(model, "infllm", **INFLLM)
    plain, cache = DynamicCache(), DynamicCache()
    expected = [run(model, part, plain) for part in ids.split([PROMPT, 1, 1, 1], 1)]
    model.model.layers[0].self_attn.compile(backend="eager")
    ours = [run(model, part, cache) for part in ids.split([PROMPT, 1, 1, 1], 1)]
    assert torch.allclose(torch.cat(ours, 1), torch.cat(expected, 1), atol=1e-5)
    assert sorted(read) == [2 * STRIDE] * LAYERS * 2 + [PROMPT] * LAYERS * 2


def test_nothing_keeps_a_cache_alive(lm: SimpleNamespace) -> None:
    model = lm.model()
    handle = apply(model, "infllm", **INFLLM)
    cache = DynamicCache()
    run(model, lm.ids(PROMPT), cache)
    kept = weakref.ref(next(iter(handle.system._beside._records[cache][0].kept.values())))
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert kept() is None
    hooks = len(model.model.layers[0].self_attn._forward_pre_hooks)
    remove(model)
    assert len(model.model.layers[0].self_attn._forward_pre_hooks) == hooks - 2


def test_gates_keep_their_keys_for_caches_in_turn(
    lm: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = lm.model(), [lm.ids(PROMPT, seed) for seed in (1, 2)]
    shape, generator = GateShape("decode", 4, 2, 16, 8, 8), torch.Generator().manual_seed(0)
    inv_freq = torch.tensor([1.0, 0.3, 0.1, 0.03])
    gates = {layer: SeerGate(shape, inv_freq, generator) for layer in range(LAYERS)}
    save_gates(GateSet(shape, gates, inv_freq), tmp_path)
    apply(model, "seer", gates=str(tmp_path), decode_budget=24)
    caches = [DynamicCache(), DynamicCache()]
    for text, cache in zip(texts, caches, strict=True):
        run(model, text, cache)
    turned: list[int] = []
    cached_key = PreRotary.cached_key
    monkeypatch.setattr(
        PreRotary, "cached_key", lambda self, call: (turned.append(call.layer), cached_key(self, call))[1]
    )
    for step in range(10):
        for cache in caches:
            token, other = lm.ids(1, step), copy.deepcopy(cache)
            ours = run(model, token, cache)
            assert not turned
            assert torch.allclose(ours, run(model, token, other), atol=1e-4)
            assert turned == list(range(LAYERS))
            turned.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windows_grow_like_those_of_the_whole(dtype: torch.dtype) -> None:
    key = torch.randn(2, 900, 3, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    windows = CompressedWindows(4)
    for length in (0, 3, 4, 7, 8, 9, 23, 24, 200, 200, 201, *range(640, 700), 899, 900):
        ours = windows.extend(key[:, :length])
        assert torch.allclose(ours, compressed_keys(key[:, :length], 4), rtol=1e-6, atol=1e-7)
        assert ours.shape == (2, max(0, length // 4 - 1), 3, 5)
        assert windows.num_tokens == length
