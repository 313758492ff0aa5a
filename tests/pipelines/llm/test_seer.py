"""SeerAttention in a model against the gate and the masked softmax, written out."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from draftattn.errors import InputError
from draftattn.pipelines.llm import apply, remove
from draftattn.pipelines.llm.seer_gate import GateForm, GateShape, SeerGate, gate_frequencies
from draftattn.pipelines.llm.seer_selection import select_by_ratio, select_by_threshold
from draftattn.pipelines.llm.seer_weights import GateSet, load_gates, save_gates

BLOCK, GATE = 8, 12


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def make_gates(folder: Path, form: GateForm, layers: tuple[int, ...] = (0, 1), head_dim: int = 16) -> GateSet:
    """Random gates of a tiny model; large weights, so that they are of clear opinions."""
    generator = torch.Generator().manual_seed(len(form))
    shape = GateShape(form, 4, 2, head_dim, BLOCK, GATE)
    inv_freq = gate_frequencies(torch.ones(head_dim // 2), GATE, 10000.0)
    gates = {layer: SeerGate(shape, inv_freq, generator) for layer in layers}
    for gate in gates.values():
        for weight in gate.parameters():
            weight.data.mul_(2.0)
    gate_set = GateSet(shape, gates, inv_freq)
    save_gates(gate_set, folder)
    return gate_set


def rotated(x: Tensor, position: int, inv_freq: Tensor) -> Tensor:
    """``[..., D]`` at a position."""
    angle = position * inv_freq.to(x)
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def compressed(gate: SeerGate, inv_freq: Tensor, key: Tensor, block: int, head: int) -> Tensor:
    """One block of keys ``[n, H_kv, D]`` as the gate of a key head compares it."""
    part = key[block * BLOCK : (block + 1) * BLOCK, head]
    pooled = torch.cat([part.amax(0), part.amin(0), part.mean(0)])
    return rotated(pooled @ gate.key_weight[head].to(key), block * BLOCK, inv_freq)


def prefill_map(gate: SeerGate, inv_freq: Tensor, query: Tensor, key: Tensor, first: int, choose: Any) -> Tensor:
    """Blocks of queries ``[N, H, D]`` from position ``first`` on, ``[H, Q, K]``; choose: a row's scores -> booleans."""
    heads, total = query.shape[1], -(-len(key) // BLOCK)
    rows = range(first // BLOCK, total)
    chosen = torch.zeros(heads, len(rows), total, dtype=torch.bool)
    for head in range(heads):
        kv_head = head // (heads // key.shape[1])
        for i, row in enumerate(rows):
            own = query[max(0, row * BLOCK - first) : (row + 1) * BLOCK - first, head].mean(0)
            q = rotated(own @ gate.query_weight[head].to(own), row * BLOCK, inv_freq)
            scores = torch.stack([q @ compressed(gate, inv_freq, key, j, kv_head) for j in range(row + 1)])
            chosen[head, i, : row + 1] = choose(scores / math.sqrt(GATE))
            chosen[head, i, row] = True
    return chosen


def decode_map(gate: SeerGate, inv_freq: Tensor, query: Tensor, key: Tensor, choose: Any) -> Tensor:
    """Blocks of one query ``[H, D]`` at the last key, ``[H, K]``."""
    position, group = len(key) - 1, query.shape[0] // key.shape[1]
    whole, total = len(key) // BLOCK, -(-len(key) // BLOCK)
    chosen = torch.zeros(query.shape[0], total, dtype=torch.bool)
    for kv_head in range(key.shape[1]):
        heads = range(kv_head * group, (kv_head + 1) * group)
        summed = torch.stack([query[head] @ gate.query_weight[head].to(query) for head in heads]).sum(0)
        q = rotated(summed, position, inv_freq)
        scores = [q @ compressed(gate, inv_freq, key, j, kv_head) / math.sqrt(GATE) for j in range(whole)]
        picked = choose(torch.stack(scores + [torch.tensor(-math.inf).to(q)] * (total - whole)))
        chosen[heads.start : heads.stop] = picked
    chosen[:, -1] = True
    return chosen


class Literal:
    """A tiny model in plain steps, given texts in chunks; layers keep all keys, before and after rotary embedding."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, select: Any) -> None:
        self.model, self.select = copy.deepcopy(model).to(dtype).cpu(), select
        self.held: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        decoder: Any = self.model.model
        hidden = decoder.embed_tokens(ids[0].cpu())
        for layer, block in enumerate(decoder.layers):
            own, x = block.self_attn, block.input_layernorm(hidden)
            query, key, value = (f(x).view(len(x), -1, own.head_dim) for f in (own.q_proj, own.k_proj, own.v_proj))
            if hasattr(own, "q_norm"):
                query, key = own.q_norm(query), own.k_norm(key)
            past = self.held.get(layer)
            if past is not None:
                key, value = torch.cat([past[0], key]), torch.cat([past[1], value])
            self.held[layer] = [key, value]
            first, inv_freq = len(key) - len(query), decoder.rotary_emb.inv_freq
            q = torch.stack([rotated(x, first + i, inv_freq) for i, x in enumerate(query)])
            k = torch.stack([rotated(x, i, inv_freq) for i, x in enumerate(key)])
            group = own.num_key_value_groups
            scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * own.scaling
            seen = torch.ones(len(query), len(key), dtype=torch.bool).tril(first)
            seen = seen & self.select(layer, query, key, first)
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            output = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, 1)).flatten(1)
            hidden = hidden + own.o_proj(output)
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return self.model.lm_head(decoder.norm(hidden))[None]


def by_ratio(ratio: float) -> Any:
    def choose(scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[-1] = math.inf
        kept = torch.zeros(len(scores), dtype=torch.bool)
        kept[scores.topk(max(1, math.ceil(round(len(scores) * ratio, 9)))).indices] = True
        return kept

    return choose


def by_threshold(threshold: float) -> Any:
    return lambda scores: scores.softmax(-1) > threshold


def prefill_select(gate_set: GateSet, choose: Any, dense_tail: int) -> Any:
    def select(layer: int, query: Tensor, key: Tensor, first: int) -> Tensor:
        if layer not in gate_set.gates or len(query) == 1:
            return torch.ones(4, len(query), len(key), dtype=torch.bool)
        chosen = prefill_map(gate_set.gates[layer].cpu(), gate_set.inv_freq, query, key, first, choose)
        if dense_tail:
            chosen[:, -dense_tail:] = True
        rows = torch.arange(first, len(key)) // BLOCK - first // BLOCK
        return chosen[:, rows][:, :, torch.arange(len(key)) // BLOCK]

    return select


def decode_select(gate_set: GateSet, choose: Any) -> Any:
    def select(layer: int, query: Tensor, key: Tensor, first: int) -> Tensor:
        if layer not in gate_set.gates or len(query) > 1:
            return torch.ones(4, len(query), len(key), dtype=torch.bool)
        chosen = decode_map(gate_set.gates[layer].cpu(), gate_set.inv_freq, query[0], key, choose)
        return chosen[:, None, torch.arange(len(key)) // BLOCK]

    return select


def in_chunks(model: PreTrainedModel, ids: Tensor, chunks: list[int], cache: Any = None) -> Tensor:
    logits = []
    for part in ids.split(chunks, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("options", "choose"),
    [({"ratio": 0.4}, by_ratio(0.4)), ({"threshold": 0.1, "dense_tail": 1}, by_threshold(0.1))],
    ids=["ratio", "threshold"],
)
def test_prefill_is_the_masked_softmax_of_what_the_gate_chose(
    family: str, options: dict[str, Any], choose: Any, lm: SimpleNamespace, tmp_path: Path
) -> None:
    model = lm.model(family)
    gate_set = make_gates(tmp_path, "prefill", head_dim=model.model.layers[0].self_attn.head_dim)
    ids = lm.ids(85)
    select = prefill_select(gate_set, choose, options.get("dense_tail", 2))
    exact, rough = (Literal(model, dtype, select)(ids) for dtype in (torch.float64, torch.float32))
    dense = model(ids).logits
    handle = apply(model, "seer", gates=str(tmp_path), **options)
    density = handle.record_density()
    bound = 2 * rms(rough - exact)
    assert rms(model(ids).logits.cpu() - exact) <= bound
    assert 0.2 < density.density() < 0.8
    assert rms(dense.cpu() - exact) > 1000 * bound
    remove(model)
    assert torch.equal(model(ids).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[40, 24, 21], [37, 30, 1, 17]], ids=str)
def test_chunks_of_a_prompt_are_gated_with_the_keys_before_them(
    chunks: list[int], lm: SimpleNamespace, tmp_path: Path
) -> None:
    model, ids = lm.model(), lm.ids(85)
    gate_set = make_gates(tmp_path, "prefill")
    select = prefill_select(gate_set, by_ratio(0.4), 0)
    exact, rough = [], []
    for dtype, logits in ((torch.float64, exact), (torch.float32, rough)):
        literal = Literal(model, dtype, select)
        logits += [literal(part) for part in ids.split(chunks, dim=1)]
    with apply(model, "seer", gates=str(tmp_path), ratio=0.4, dense_tail=0):
        logits = in_chunks(model, ids, chunks).cpu()
        whole = model(ids).logits.cpu()
    exact, rough = torch.cat(exact, 1), torch.cat(rough, 1)
    assert rms(logits - exact) <= 3 * rms(rough - exact)  # keys from the cache are rotated and turned back
    if not any(chunk % BLOCK for chunk in chunks[:-1]):
        assert rms(whole - exact) <= 3 * rms(rough - exact)


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "choose"),
    [
        ({"decode_budget": 24}, lambda scores: scores >= with_last(scores).topk(min(3, len(scores))).values[-1]),
        ({"decode_threshold": 0.15}, by_threshold(0.15)),
    ],
    ids=["budget", "threshold"],
)
def test_decoding_is_the_masked_softmax_of_what_the_gate_chose(
    options: dict[str, Any], choose: Any, lm: SimpleNamespace, tmp_path: Path
) -> None:
    model, ids = lm.model(), lm.ids(58)
    gate_set = make_gates(tmp_path, "decode")
    chunks = [35, 5] + [1] * 18
    exact, rough = [], []
    for dtype, logits in ((torch.float64, exact), (torch.float32, rough)):
        literal = Literal(model, dtype, decode_select(gate_set, choose))
        logits += [literal(part) for part in ids.split(chunks, dim=1)]
    exact, rough = torch.cat(exact, 1), torch.cat(rough, 1)
    bound = 2 * rms(rough - exact)
    dense = in_chunks(model, ids, chunks)
    handle = apply(model, "seer", gates=str(tmp_path), **options)
    density = handle.record_density()
    logits = in_chunks(model, ids, chunks)
    assert rms(logits.cpu() - exact) <= bound
    assert density.density() < 0.9
    assert rms(dense.cpu() - exact) > 1000 * bound
    # a cache that was filled densely, and one that was reordered since
    remove(model)
    filled = model(ids[:, :35]).past_key_values
    apply(model, "seer", gates=str(tmp_path), **options)
    assert torch.allclose(in_chunks(model, ids[:, 35:], chunks[1:], filled), logits[:, 35:], atol=1e-4)
    others = lm.ids(58, seed=1)
    cache = model(torch.cat([others, ids])[:, :40]).past_key_values
    cache.reorder_cache(torch.tensor([1, 0], device=ids.device))
    both = in_chunks(model, torch.cat([ids, others])[:, 40:], [1] * 18, cache)
    assert torch.allclose(both[:1], logits[:, 40:], atol=1e-4)


def with_last(scores: Tensor) -> Tensor:
    """Scores of a query whose last block is always taken."""
    return torch.cat([scores[:-1], torch.full_like(scores[-1:], math.inf)])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_items_alone(side: str, lm: SimpleNamespace, tmp_path: Path) -> None:
    model = lm.model()
    make_gates(tmp_path, "prefill")
    make_gates(tmp_path, "decode")
    texts = [lm.ids(length, seed=length) for length in (61, 45, 45)]
    batch = lm.pad(texts, side)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with apply(model, "seer", gates=str(tmp_path), ratio=0.4, decode_budget=24):
        together = lm.real_rows(batch, model(**batch).logits)
        for text, logits in zip(texts, together, strict=True):
            alone = model(text).logits
            assert rms(logits - alone) < 1e-5 * rms(alone)
        if side == "left":
            generated = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
            for item, text in enumerate(texts):
                alone = model.generate(text, attention_mask=torch.ones_like(text), **settings)
                assert torch.equal(generated[item, -12:], alone[0, -12:])


@torch.no_grad()
def test_only_layers_with_gates_are_sparse(lm: SimpleNamespace, tmp_path: Path) -> None:
    model, ids = lm.model(), lm.ids(85)
    gate_set = make_gates(tmp_path, "prefill", layers=(1,))
    select = prefill_select(gate_set, by_ratio(0.4), 2)
    exact, rough = (Literal(model, dtype, select)(ids) for dtype in (torch.float64, torch.float32))
    dense = model(ids).logits
    with apply(model, "seer", gates=str(tmp_path), ratio=0.4):
        assert rms(model(ids).logits.cpu() - exact) <= 2 * rms(rough - exact)
    with apply(model, "seer", gates=str(tmp_path), ratio=0.4, dense_layers=(-1,)):
        assert torch.allclose(model(ids).logits, dense, atol=1e-4)
    with apply(model, "seer", gates=str(tmp_path), ratio=0.4, dense_len=85), pytest.warns(UserWarning, match="dense"):
        assert torch.allclose(model(ids).logits, dense, atol=1e-4)


def test_selection_against_sorted_rows() -> None:
    scores = torch.randn(2, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(9, 13, dtype=torch.bool).tril(4)[None, None]
    own = torch.eye(13, dtype=torch.bool)[4:][None, None]
    for ratio in (0.0, 0.1, 0.3, 0.75, 1.0):
        kept = select_by_ratio(scores, visible, own, ratio, dense_tail=2)
        for row in range(7):
            expected = by_ratio(ratio)
            for item, head in ((0, 0), (1, 2)):
                assert torch.equal(kept[item, head, row, : row + 5], expected(scores[item, head, row, : row + 5]))
        assert torch.equal(kept[:, :, 7:], visible[:, :, 7:].expand(2, 3, -1, -1))
        assert not (kept & ~visible).any()
    assert torch.equal(select_by_threshold(scores, visible, own, 1.0)[1, 1], own[0, 0])


def test_gates_keep_what_was_saved(tmp_path: Path) -> None:
    saved = make_gates(tmp_path, "decode", layers=(0, 7))
    loaded = load_gates(tmp_path, "decode")
    assert loaded is not None
    assert loaded.shape == saved.shape
    assert list(loaded.gates) == [0, 7]
    for layer, gate in loaded.gates.items():
        for name, weight in gate.named_parameters():
            assert torch.equal(weight, saved.gates[layer].get_parameter(name))
    assert load_gates(tmp_path, "prefill") is None


def test_what_does_not_fit_is_refused(lm: SimpleNamespace, tmp_path: Path) -> None:
    model = lm.model()
    for options, message in (
        ({}, "gates names no folder"),
        ({"gates": str(tmp_path / "none")}, "holds no gates"),
        ({"gates": "x", "ratio": 0.5, "threshold": 0.1}, "both given"),
        ({"gates": "x", "ratio": 1.5}, "ratio is 1.5"),
        ({"gates": "x", "decode_budget": 0}, "decode_budget 0"),
    ):
        with pytest.raises(InputError, match=message):
            apply(model, "seer", **options)
    make_gates(tmp_path, "prefill", layers=(0, 2))
    with pytest.raises(InputError, match="gates are for layer 2"):
        apply(model, "seer", gates=str(tmp_path))
    make_gates(tmp_path, "prefill", head_dim=32)
    with pytest.raises(InputError, match="head_dim 32"):
        apply(model, "seer", gates=str(tmp_path))
    description = json.loads((tmp_path / "prefill.json").read_text())
    description["shape"]["gate_dim"] = 16
    (tmp_path / "prefill.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="cannot be read"):
        apply(model, "seer", gates=str(tmp_path))
    make_gates(tmp_path, "prefill")
    del model.model.layers[1].self_attn.k_proj
    with pytest.raises(InputError, match="without k_proj"):
        apply(model, "seer", gates=str(tmp_path))
    assert model.config._attn_implementation == "sdpa"
    for shape in ({"form": "other"}, {"block_size": 0}, {"gate_dim": 3}):
        with pytest.raises(InputError):
            dataclasses.replace(GateShape("prefill", 4, 2, 16), **shape)
