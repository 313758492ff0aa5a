"""Systems come and go without a trace, and what cannot be served is refused with a reason."""

from __future__ import annotations

import copy
import gc
import pathlib
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel

from draftattn.errors import InputError
from draftattn.pipelines.llm import AttentionCall, AttentionSystem, SystemConfig, apply, remove
from draftattn.pipelines.llm.dense import dense_attention
from draftattn.pipelines.llm.seer_gate import GateShape, SeerGate
from draftattn.pipelines.llm.seer_weights import GateSet, save_gates

EVERYTHING = {"density": 1.0, "dense_len": 0, "block_size": 16}
SPARSE = {"density": 0.4, "dense_len": 0, "block_size": 16}
NSA_SIZES = {"compression_block": 8, "compression_stride": 4, "block_size": 16, "num_selected": 3, "window": 9}


class Observed(AttentionSystem):
    """Dense, and remembers its calls."""

    name = "observed"
    sparse_decode = True

    def __init__(self, config: SystemConfig) -> None:
        super().__init__(config)
        self.calls: list[tuple[int, tuple[int, ...] | None, int, int, int, bool]] = []

    def attend(self, call: AttentionCall) -> Tensor:
        batch = call.query.shape[0]
        self.calls.append((call.layer, call.items, call.num_queries, call.num_keys, batch, call.cache is not None))
        assert call.take(torch.zeros(8, 64, 3)).shape[1] == call.num_queries or call.query_offset
        return dense_attention(call.query, call.key, call.value, call.scale)


@torch.no_grad()
def logits(model: torch.nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    return model(*args, **kwargs).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_system_that_keeps_everything_equals_dense_and_removal_restores_every_bit(
    lm: SimpleNamespace, family: str
) -> None:
    model, ids = lm.model(family), lm.ids(75)
    weights, before = copy.deepcopy(model.state_dict()), logits(model, ids)
    exact = logits(copy.deepcopy(model).double(), ids)
    handle = apply(model, "draft", **EVERYTHING)
    recorder = handle.record_density()
    kept = logits(model, ids)
    assert recorder.by_layer() == {0: 1.0, 1: 1.0}
    assert (kept - exact).abs().max() <= 2 * (before - exact).abs().max()
    apply(model, "draft", **SPARSE)
    assert (logits(model, ids) - before).abs().max() > 1e-2
    remove(model)
    assert torch.equal(logits(model, ids), before)
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    remove(model)  # nothing to take out, nothing happens


def test_a_handle_is_a_context_manager_and_forgets_a_model_that_is_gone(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(40)
    before = logits(model, ids)
    with apply(model, "draft", **SPARSE) as handle:
        assert handle.config.density == 0.4
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)
    handle = apply(model, "draft", **SPARSE)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    handle.remove()


def test_dense_layers_stay_dense(lm: SimpleNamespace) -> None:
    model = lm.model()
    recorder = apply(model, "draft", **SPARSE, dense_layers=[-1]).record_density()
    logits(model, lm.ids(80))
    assert list(recorder.by_layer()) == [0]
    with pytest.raises(InputError, match="dense_layers names layer 2; the model has layers 0 to 1"):
        apply(model, "draft", dense_layers=[2])


def test_short_sequences_stay_dense_and_this_is_said_once(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(40)
    before = logits(model, ids)
    apply(model, "draft", **{**SPARSE, "dense_len": 40})
    with pytest.warns(UserWarning, match=r"up to 40 tokens stay dense.*; dense_len=0 makes them sparse$") as said:
        assert torch.equal(logits(model, ids), before)
    assert [warning.filename for warning in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, ids)
    assert not torch.equal(logits(model, lm.ids(41))[:, :40], before)


@pytest.mark.parametrize("applied", ["moba", "nsa", "streaming"])
def test_a_failed_apply_leaves_what_was_applied_in_force(
    lm: SimpleNamespace, tmp_path: pathlib.Path, applied: str
) -> None:
    model, ids = lm.model(), lm.ids(60)
    stock = logits(model, ids)
    shape = GateShape("prefill", 4, 2, head_dim=32, block_size=16, gate_dim=8)  # the model's heads have 16 channels
    inv_freq = torch.ones(4)
    save_gates(GateSet(shape, {0: SeerGate(shape, inv_freq)}, inv_freq), tmp_path)
    options = {"moba": {"chunk_size": 8, "top_k": 2}, "nsa": NSA_SIZES, "streaming": {"sink": 2, "window": 9}}[applied]
    handle = apply(model, applied, **options)
    recorder = handle.record_density()
    if applied == "nsa":
        with torch.no_grad():
            for x in handle.system.parameters():
                x.add_(0.1)  # as training does
    before = logits(model, ids)
    assert not torch.equal(before, stock)
    for system, others, words in (
        ("selective", {"head": 9}, "head is 9"),
        ("seer", {"gates": tmp_path}, "head_dim 32"),
        ("nsa", {"weights": "nowhere"}, "nowhere"),
        ("streaming", {"dense_layers": [0]}, "dense_layers"),
    ):
        with pytest.raises(InputError, match=words):
            apply(model, system, **others)
        assert torch.equal(logits(model, ids), before)
    recorder.reset()
    logits(model, ids)
    assert recorder.density()
    handle.remove()
    assert torch.equal(logits(model, ids), stock)
    assert model.config._attn_implementation == "sdpa"


def test_untrained_gates_are_told_of_once_outside_training(lm: SimpleNamespace, tmp_path: pathlib.Path) -> None:
    model, ids = lm.model(), lm.ids(40)
    handle = apply(model, "nsa", **NSA_SIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(ids)
    with pytest.warns(UserWarning, match="nsa: no weights are given, so its gates are untrained"):
        logits(model.eval(), ids)
    handle.system.save(tmp_path / "weights")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, ids)
        apply(model, "nsa", **NSA_SIZES, weights=tmp_path / "weights")
        logits(model, ids)
        handle = apply(model, "nsa", **NSA_SIZES)
        with torch.no_grad():
            handle.system.branches[0].gate.weight.add_(0.1)  # as training does
        logits(model, ids)


def test_calls_come_without_padding_and_with_the_cache(lm: SimpleNamespace) -> None:
    model = lm.model(num_hidden_layers=1)
    system = Observed(SystemConfig())
    apply(model, system)
    batch = lm.pad([lm.ids(9, 1), lm.ids(5, 2), lm.ids(9, 3)], "left")
    logits(model, **batch, use_cache=False)
    assert system.calls == [(0, (0, 2), 9, 9, 2, False), (0, (1,), 5, 5, 1, False)]
    system.calls.clear()
    model.generate(**{name: batch[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=2, do_sample=False)
    assert system.calls[2:] == [(0, (0, 2), 1, 10, 2, True), (0, (1,), 1, 6, 1, True)]
    system.calls.clear()
    logits(model, batch["input_ids"], attention_mask=torch.ones_like(batch["attention_mask"]))
    assert system.calls == [(0, None, 9, 9, 3, True)]


def test_beams_are_served(lm: SimpleNamespace) -> None:
    model = lm.model()
    batch = lm.pad([lm.ids(30, 1), lm.ids(21, 2)], "left")
    del batch["position_ids"]
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    expected = model.generate(**batch, **settings)
    apply(model, "draft", **EVERYTHING)
    assert torch.equal(model.generate(**batch, **settings), expected)


def test_a_static_cache_holds_more_keys_than_are_seen(lm: SimpleNamespace) -> None:
    model = lm.model()
    batch = lm.pad([lm.ids(9, 1), lm.ids(6, 2)], "left")
    del batch["position_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**batch, **settings)
    system = Observed(SystemConfig())
    apply(model, system)
    assert torch.equal(
        model.generate(**batch, **settings, cache_implementation="static", disable_compile=True), expected
    )
    assert max(keys for _, _, _, keys, _, _ in system.calls) == 13


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sliding_window_that_hides_something_is_kept(lm: SimpleNamespace, side: str) -> None:
    for family, window, served in (
        ("mistral", {"sliding_window": 20}, []),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}, [0]),
    ):
        model = lm.model(family, **window)
        batch = lm.pad([lm.ids(50, 1), lm.ids(34, 2)], side)
        before = logits(model, **batch)
        exact = logits(copy.deepcopy(model).double(), **batch)
        recorder = apply(model, "draft", **EVERYTHING).record_density()
        pairs = zip(*(lm.real_rows(batch, x) for x in (logits(model, **batch), before, exact)), strict=True)
        for ours, torchs, truth in pairs:
            assert (ours - truth).abs().max() <= 3 * (torchs - truth).abs().max()
        assert list(recorder.by_layer()) == served
        if side == "left":
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            ours = model.generate(**given, max_new_tokens=4, do_sample=False)
            remove(model)
            assert torch.equal(ours, model.generate(**given, max_new_tokens=4, do_sample=False))


def test_a_compiled_layer_is_served(lm: SimpleNamespace) -> None:
    model = lm.model(num_hidden_layers=1)
    apply(model, "draft", **SPARSE)
    batches = [lm.pad([lm.ids(60, 1), lm.ids(length, 2)], "left") for length in (41, 52)]
    expected = [logits(model, **batch) for batch in batches]
    model.model.layers[0].self_attn.compile(backend="eager")
    assert all(torch.equal(logits(model, **batch), x) for batch, x in zip(batches, expected, strict=True))


def test_a_copy_of_a_served_model_is_dense(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(60)
    before = logits(model, ids)
    apply(model, "draft", **SPARSE)
    twin = copy.deepcopy(model)
    assert (logits(twin, ids) - before).abs().max() < 1e-4
    with pytest.raises(InputError, match="copy"):
        apply(twin, "draft")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_model(lm: SimpleNamespace, checkpointing: bool) -> None:
    model, ids = lm.model(), lm.ids(50)
    apply(model, "draft", **EVERYTHING)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    model(ids, labels=ids).loss.backward()
    ours = {name: x.grad.clone() for name, x in model.named_parameters()}
    remove(model)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, x in model.named_parameters():
        assert (ours[name] - x.grad).norm() <= 1e-4 * x.grad.norm(), name


def test_what_cannot_be_served_is_refused(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(12)
    with pytest.raises(InputError, match="system is 'dragon'; choose from draft, xattention"):
        apply(model, "dragon")
    with pytest.raises(InputError, match="moba has no option chunks; it has dense_len, dense_layers, chunk_size"):
        apply(model, "moba", chunks=3)
    with pytest.raises(InputError, match=r"^model is a str; the model comes first") as swapped:
        apply("draft", model)  # type: ignore[arg-type]
    assert len(str(swapped.value)) < 120
    with pytest.raises(InputError, match=r"^system is a LlamaForCausalLM; it must be a name"):
        apply(model, model)  # type: ignore[arg-type]
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(InputError, match=r"GPT2LMHeadModel has no attention module with layer_idx, .*scaling"):
        apply(gpt2, "moba")
    with pytest.raises(InputError, match="must be a model of transformers"):
        apply(torch.nn.Linear(2, 2), "moba")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dense_len is -1"):
        apply(model, "moba", dense_len=-1)
    assert model.config._attn_implementation == "sdpa"

    apply(model, "draft", **SPARSE)
    gaps = torch.ones_like(ids)
    gaps[0, 3] = 0
    with pytest.raises(InputError, match="attention_mask of item 0 has gaps"):
        logits(model, ids, attention_mask=gaps)
    packed = torch.arange(12)[None] % 6
    with pytest.raises(InputError, match="without packed sequences"):
        logits(model, ids, position_ids=packed.to(ids.device), use_cache=False)
    collated = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": [3] * n} for n in (5, 7)])
    collated = {name: x.to(ids.device) if isinstance(x, Tensor) else x for name, x in collated.items()}
    with pytest.raises(InputError, match=r"packed sequences .cu_seq_lens_q, cu_seq_lens_k. cannot be served"):
        logits(model, **collated)
    with pytest.raises(InputError, match=r"a mask \[1, 1, 12, 12\]"):
        logits(model, ids, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool, device=ids.device))

    model = lm.model(attention_dropout=0.1)
    apply(model, "draft", **SPARSE)
    logits(model, ids)  # no dropout outside training
    with pytest.raises(InputError, match=r"attention dropout is 0\.1"):
        model.train()(ids)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_values_narrower_than_keys_are_served_densely(lm: SimpleNamespace, side: str) -> None:
    model = lm.model("deepseek")
    batch = lm.pad([lm.ids(12), lm.ids(7, seed=1)], side)
    stock = lm.real_rows(batch, logits(model, **batch))
    with apply(model, "draft"):
        for ours, expected in zip(lm.real_rows(batch, logits(model, **batch)), stock, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        step = model(lm.ids(12), use_cache=True)
        decoded = model(lm.ids(1), past_key_values=step.past_key_values).logits
    whole = logits(model, torch.cat([lm.ids(12), lm.ids(1)], dim=1))
    torch.testing.assert_close(decoded, whole[:, 12:], rtol=1e-4, atol=1e-4)


def test_a_decode_step_over_a_mask_with_gaps_is_served_where_decoding_is_dense(lm: SimpleNamespace) -> None:
    model = lm.model()
    batch = lm.pad([lm.ids(20, 1), lm.ids(13, 2)], "right")
    after = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long, device=lm.device)], dim=1)
    step = {"attention_mask": after, "position_ids": batch["attention_mask"].sum(-1, keepdim=True)}
    token = lm.ids(2, 5).T

    def decoded() -> Tensor:
        with torch.no_grad():
            cache = model(**batch).past_key_values
            return model(token, past_key_values=cache, **step).logits

    expected = decoded()
    apply(model, "draft", **EVERYTHING)
    assert (decoded() - expected).abs().max() < 1e-4
