"""Distilling gates: targets, what is learned, and runs that are stopped."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from draftattn.errors import InputError
from draftattn.pipelines.llm import apply
from draftattn.pipelines.llm.seer_gate import GateForm, GateShape, SeerGate
from draftattn.pipelines.llm.seer_targets import GateSample, GateTargets, gate_loss
from draftattn.pipelines.llm.seer_training import distill
from draftattn.pipelines.llm.seer_weights import load_gates

BLOCK = 8


@pytest.fixture(autouse=True)
def torch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user without a GPU runs; Triton's interpreter takes minutes for the same."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


class Kept(GateTargets):
    """Keeps the calls too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: dict[int, Any] = {}

    def attend(self, call: Any) -> Tensor:
        self.calls[call.layer] = call
        return super().attend(call)


@torch.no_grad()
@pytest.mark.parametrize("form", ["prefill", "decode"])
def test_targets_are_the_largest_probabilities_of_stock_attention(form: GateForm, lm: SimpleNamespace) -> None:
    model, ids = lm.model(), torch.cat([lm.ids(61), lm.ids(61, seed=1)])
    stock = lm.model(attn_implementation="eager")
    probabilities = stock(ids, output_attentions=True).attentions
    samples: dict[int, GateSample] = {}
    system = Kept(GateShape(form, 4, 2, 16, BLOCK, 12), (0, 1), samples.__setitem__)
    with apply(model, system):
        logits = model(ids, use_cache=False).logits
    assert torch.allclose(logits, stock(ids).logits, atol=1e-4)
    for layer, sample in samples.items():
        largest = torch.nn.functional.pad(probabilities[layer], (0, 3)).unflatten(-1, (8, BLOCK)).amax(-1)
        if form == "prefill":
            expected = torch.nn.functional.pad(largest, (0, 0, 0, 3)).unflatten(2, (8, BLOCK)).amax(3)
            assert sample.position == 0
        else:
            rows = sample.position[0]
            assert len(rows) == 61 - 15
            assert rows.min() >= 15
            whole = (torch.arange(8, device=ids.device) + 1) * BLOCK <= rows[:, None] + 1
            assert torch.equal(sample.visible, whole)
            expected = (largest[:, :, rows] * whole).unflatten(1, (2, 2)).amax(2)
        assert torch.allclose(sample.target, expected, atol=1e-5)


def test_the_loss_is_the_divergence_of_the_rows(lm: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    gate = SeerGate(GateShape("prefill", 4, 2, 16, BLOCK, 12), torch.ones(6))
    rows = 9
    query, features, target = (
        torch.randn(2, rows, h, d, generator=generator) for h, d in ((4, 16), (2, 48), (4, rows))
    )
    target = target.transpose(1, 2).exp()
    visible = torch.ones(rows, rows, dtype=torch.bool).tril()
    sample = GateSample(query, features, 0, visible, target)
    scores = gate.scores(query, gate.compress(features))
    terms = []
    for row in range(2, rows):
        p = target[:, :, row, : row + 1]
        p = p / p.sum(-1, keepdim=True)
        q = scores[:, :, row, : row + 1].softmax(-1)
        terms.append((p * (p / q).log()).sum(-1))
    assert torch.allclose(gate_loss(gate, sample), 10 * torch.stack(terms).mean(), rtol=1e-5)
    gate_loss(gate, sample).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in gate.parameters())


def texts(lm: SimpleNamespace, count: int = 3) -> list[Tensor]:
    return [lm.ids(96, seed=seed) for seed in range(count)]


SETTINGS: dict[str, Any] = {"block_size": BLOCK, "gate_dim": 16, "learning_rate": 1e-2}


@pytest.mark.parametrize("form", ["prefill", "decode"])
def test_gates_learn_and_the_model_does_not(form: GateForm, lm: SimpleNamespace, tmp_path: Path) -> None:
    model = lm.model()
    before = copy.deepcopy(model.state_dict())
    lines: list[str] = []
    batches = texts(lm)
    training = distill(
        model, batches, output=tmp_path, layers=[-1], epochs=15, form=form, on_progress=lines.append, **SETTINGS
    )
    assert training["loss"][-1] < 0.5 * training["loss"][0]
    assert len(lines) == len(training["loss"]) == 15
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{form}.json", f"{form}.safetensors"]
    with safe_open(tmp_path / f"{form}.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"inv_freq", "1.query_weight", "1.key_weight"}
    loaded = load_gates(tmp_path, form)
    assert loaded is not None
    assert torch.equal(loaded.inv_freq, model.model.rotary_emb.inv_freq.cpu()[:8])
    # a text that was not seen: the gate finds more of the attention than one that learned nothing
    samples: dict[int, GateSample] = {}
    with apply(model, GateTargets(loaded.shape, (1,), samples.__setitem__)), torch.no_grad():
        model(lm.ids(96, seed=9), use_cache=False)
    losses = [
        gate_loss(gate.to(lm.device), samples[1]).item()
        for gate in (loaded.gates[1], SeerGate(loaded.shape, loaded.inv_freq))
    ]
    assert losses[0] < losses[1]
    assert distill(model, batches, output=tmp_path, layers=[1], epochs=15, form=form, **SETTINGS) == training
    with pytest.raises(InputError, match="of other settings"):
        distill(model, batches, output=tmp_path, layers=[0], epochs=15, form=form, **SETTINGS)


@pytest.mark.parametrize("form", ["prefill", "decode"])
def test_a_stopped_run_ends_like_one_that_was_not(form: GateForm, lm: SimpleNamespace, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("epoch 2 "):
            raise Stopped

    model, batches = lm.model(), texts(lm)
    settings = {**SETTINGS, "epochs": 4, "form": form, "seed": 3}
    whole = distill(model, batches, output=tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        distill(model, batches, output=tmp_path / "stopped", on_progress=stop, **settings)
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [f"{form}.unfinished.safetensors"]
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(InputError, match="unfinished run of other settings"):
        distill(model, batches[:2], output=tmp_path / "stopped", **settings)
    lines: list[str] = []
    assert distill(model, batches, output=tmp_path / "stopped", on_progress=lines.append, **settings) == whole
    assert len(lines) == 2
    gates = [load_gates(tmp_path / name, form) for name in ("whole", "stopped")]
    for layer in (0, 1):
        for name, weight in gates[0].gates[layer].named_parameters():
            assert torch.equal(weight, gates[1].gates[layer].get_parameter(name))
    assert json.loads((tmp_path / "stopped" / f"{form}.json").read_text())["training"] == whole


def test_with_one_epoch_nothing_is_kept(lm: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []
    to = GateSample.to
    monkeypatch.setattr(GateSample, "to", lambda self, device: (moved.append(str(device)), to(self, device))[1])
    distill(lm.model(), texts(lm), output=tmp_path / "a", epochs=1, **SETTINGS)
    once = len(moved)
    distill(lm.model(), texts(lm), output=tmp_path / "b", epochs=2, **SETTINGS)
    assert once == 3 * 2
    assert len(moved) - once == 3 * once  # kept once, read twice


def test_distilled_gates_serve(lm: SimpleNamespace, tmp_path: Path) -> None:
    """Trained, then applied: kept mass between that of equal blocks and the best."""
    model, batches, ids = lm.model(), texts(lm), lm.ids(96)
    for form in ("prefill", "decode"):
        distill(model, batches, output=tmp_path, epochs=20, form=form, **SETTINGS)
    generation = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    dense = model.generate(ids, **generation)
    with apply(model, "seer", gates=str(tmp_path), ratio=1.0, decode_budget=4096):
        same = model.generate(ids, **generation)
    assert torch.equal(dense, same)
    handle = apply(model, "seer", gates=str(tmp_path), ratio=0.3, decode_budget=32)
    density = handle.record_density()
    model.generate(ids, **generation)
    assert density.density() < 0.7


def test_settings_out_of_range_are_refused(lm: SimpleNamespace, tmp_path: Path) -> None:
    model = lm.model()
    for changes, message in (
        ({"layers": [2]}, "layer 2; the model has layers 0 to 1"),
        ({"layers": []}, "at least one"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": 0.0}, "learning_rate 0"),
        ({"block_size": 64}, "at least 256 tokens"),
        ({"gate_dim": 7}, "gate_dim is 7"),
        ({"form": "both"}, "form is 'both'"),
    ):
        with pytest.raises(InputError, match=message):
            distill(model, texts(lm, 1), output=tmp_path, **{**SETTINGS, **changes})
    with pytest.raises(InputError, match="no texts"):
        distill(model, [], output=tmp_path, **SETTINGS)
    assert not list(tmp_path.iterdir())
