"""Native Sparse Attention inside models of transformers."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from draftattn.errors import InputError
from draftattn.pipelines.llm import AttentionHandle, apply, remove
from draftattn.pipelines.llm.nsa_cache import NSALayer

PAPER: dict[str, Any] = dict(compression_block=8, compression_stride=4, block_size=16, num_selected=4, window=10)
MEAN: dict[str, Any] = dict(PAPER, compression="mean", compression_block=16, compression_stride=16)
FORMS = {"paper": PAPER, "mean": MEAN}
EXACT: dict[str, Any] = dict(rtol=1e-8, atol=1e-8)  # in float64: what is left of it after a few layers


def trained(handle: AttentionHandle, seed: int = 1) -> AttentionHandle:
    """Gives the added parameters values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.system.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return handle


@pytest.fixture
def sparse(lm: SimpleNamespace) -> Any:
    """A tiny model in float64 with NSA, whose added parameters are random."""

    def make(family: str = "llama", **options: Any) -> tuple[PreTrainedModel, AttentionHandle]:
        model = lm.model(family).double()
        return model, trained(apply(model, "nsa", **options))

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_cached_decoding_equals_one_pass(lm: SimpleNamespace, sparse: Any, family: str) -> None:
    model, _ = sparse(family, **PAPER)
    ids = lm.ids(79)
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([5, 36, 20, *[1] * 18], 1)]
    assert isinstance(cache.layers[0], NSALayer)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    # it is the cached blocks that were used
    assert cache.layers[0].filled == [(79 - 8) // 4 + 1]
    remove(model)
    assert (model(ids).logits - whole).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_items_get_what_they_get_alone(lm: SimpleNamespace, sparse: Any, side: str, form: str) -> None:
    model, _ = sparse(**FORMS[form])
    sequences = [lm.ids(length, seed=length) for length in (77, 40, 3)]
    batch = lm.pad(sequences, side)
    for row, sequence in zip(lm.real_rows(batch, model(**batch).logits), sequences, strict=True):
        torch.testing.assert_close(row, model(sequence).logits, **EXACT)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_generation_of_a_padded_batch(lm: SimpleNamespace, sparse: Any, form: str) -> None:
    model, _ = sparse(**FORMS[form])
    sequences = [lm.ids(length, seed=length) for length in (39, 22)]
    batch = lm.pad(sequences, "left")
    options: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6)
    together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, **options)
    for row, sequence in zip(together, sequences, strict=True):
        alone = model.generate(
            sequence, attention_mask=torch.ones_like(sequence), do_sample=False, use_cache=False, **options
        )
        assert torch.equal(row[39:], alone[0, sequence.shape[1] :])
    beams = [
        model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=2, use_cache=use_cache, **options
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


@torch.no_grad()
def test_positions_may_begin_anywhere(lm: SimpleNamespace, sparse: Any) -> None:
    model, _ = sparse(**PAPER)
    ids = lm.ids(45)
    shifted = model(ids, position_ids=torch.arange(100, 145, device=ids.device)[None]).logits
    # the rotary embedding is relative, but the compression is applied before it
    torch.testing.assert_close(shifted, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_caches_work_without_stored_blocks(lm: SimpleNamespace, sparse: Any) -> None:
    model, _ = sparse(**PAPER)
    ids = lm.ids(40)
    cache = StaticCache(config=model.config, max_cache_len=64)
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([33, 1, 1, 5], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, **EXACT)


@torch.no_grad()
def test_a_cropped_cache_continues(lm: SimpleNamespace, sparse: Any) -> None:
    model, _ = sparse(**PAPER)
    ids, others = lm.ids(60), lm.ids(60, seed=9)
    cache = DynamicCache(config=model.config)
    model(torch.cat([ids[:, :30], others[:, 30:]], 1), past_key_values=cache)
    cache.crop(-30)
    torch.testing.assert_close(model(ids[:, 30:], past_key_values=cache).logits, model(ids).logits[:, 30:], **EXACT)


@pytest.mark.filterwarnings("ignore:.*stay dense")
@torch.no_grad()
def test_dense_beginnings_join_in_later(lm: SimpleNamespace, sparse: Any) -> None:
    model, handle = sparse(**PAPER, dense_len=40)
    ids = lm.ids(70)
    cache = DynamicCache(config=model.config)
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([30, 25, 1, 14], 1)]
    assert cache.layers[1].filled == [(70 - 8) // 4 + 1]
    # the blocks of the dense beginning are there
    again = DynamicCache(config=model.config)
    model(ids[:, :30], past_key_values=again)
    torch.testing.assert_close(torch.cat(pieces[1:], 1), model(ids[:, 30:], past_key_values=again).logits, **EXACT)
    assert handle.system._calls == {}


@torch.no_grad()
def test_removing_restores_every_bit(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(40)
    before, names = model(ids).logits, list(model.state_dict())
    handle = trained(apply(model, "nsa", **PAPER))
    assert not torch.equal(model(ids).logits, before)
    handle.remove()
    assert torch.equal(model(ids).logits, before)
    assert list(model.state_dict()) == names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_density_counts_all_branches(lm: SimpleNamespace, sparse: Any) -> None:
    model, handle = sparse(compression_block=4, compression_stride=4, block_size=4, num_selected=3, window=2)
    recorder = handle.record_density()
    model(lm.ids(10))
    compressed = sum((t + 1) // 4 for t in range(10))
    selected = sum(min(t + 1, 4 * 2 + t % 4 + 1) for t in range(10))
    window = sum(min(t + 1, 2) for t in range(10))
    assert recorder.density() == pytest.approx((compressed + selected + window) / 55)


def text_batches(count: int, batch: int, length: int) -> Tensor:
    """Bytes of real text, ``[count, batch, length]``."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    values = torch.tensor(list(text.encode("ascii", "replace")[: count * batch * length]))
    return values.view(batch, count, length).transpose(0, 1)


def test_a_model_trained_from_scratch_learns_text(lm: SimpleNamespace) -> None:
    model = lm.model(vocab_size=128, initializer_range=0.05, tie_word_embeddings=True).train()
    handle = apply(model, "nsa", **PAPER, gate_init=(0.0, 0.0, 0.0))
    before = [x.detach().clone() for x in handle.system.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    batches = text_batches(12, 2, 96).to(lm.device)
    share = batches.flatten().bincount() / batches.numel()
    entropy = -(share * share.log()).nansum().item()
    losses = []
    for batch in batches.repeat(5, 1, 1):
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4.5  # of ln 128 = 4.85
    # better than knowing how frequent each byte is
    assert sum(losses[-10:]) / 10 < entropy - 0.1
    for old, new in zip(before, handle.system.parameters(), strict=True):
        assert new.grad is not None
        assert not torch.equal(old, new)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_with_and_without_a_cache(lm: SimpleNamespace, sparse: Any, form: str) -> None:
    model, handle = sparse(**FORMS[form])
    ids = lm.ids(41)
    gradients = []
    for use_cache in (False, True):
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append([x.grad for x in model.parameters()])
        assert all(x.grad is not None and x.grad.any() for x in handle.system.parameters())
    for without, with_cache in zip(*gradients, strict=True):
        torch.testing.assert_close(without, with_cache)


@torch.no_grad()
def test_weights_survive_a_file(lm: SimpleNamespace, tmp_path: Path) -> None:
    path, ids = tmp_path / "nsa.safetensors", lm.ids(50)
    model = lm.model()
    handle = trained(apply(model, "nsa", **PAPER))
    expected = model(ids).logits
    handle.remove()
    handle.system.save(path)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    apply(model, "nsa", weights=str(path), **PAPER)
    assert torch.equal(model(ids).logits, expected)
    with safe_open(path, "pt") as file:
        added = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert added == sum(x.numel() for x in handle.system.parameters())


def test_weights_of_something_else_are_refused(lm: SimpleNamespace, tmp_path: Path) -> None:
    model, path, other = lm.model(), tmp_path / "nsa.safetensors", tmp_path / "other.safetensors"
    handle = apply(model, "nsa", **PAPER)
    handle.system.save(path)
    remove(model)
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(InputError, match="are for"):
        apply(model, "nsa", weights=str(path), **MEAN)
    with pytest.raises(InputError, match="cannot be read"):
        apply(model, "nsa", weights=str(tmp_path / "nothing"), **PAPER)
    with pytest.raises(InputError, match="are for None"):
        apply(model, "nsa", weights=str(other), **PAPER)
    with pytest.raises(InputError, match="do not fit"):
        apply(lm.model(num_hidden_layers=3), "nsa", weights=str(path), **PAPER)
    assert not any("nsa" in name for name, _ in model.named_parameters())
    assert model.config._attn_implementation == "sdpa"
