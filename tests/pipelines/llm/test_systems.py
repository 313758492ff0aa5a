"""What every training-free system must do: padding, cached decoding, chunks of a prompt, generation, density."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from draftattn.pipelines.llm import apply, remove

SYSTEMS: dict[str, dict[str, Any]] = {
    "draft": {"density": 0.5, "block_size": 16},
    "draft with residual": {"density": 0.5, "block_size": 16, "residual": True},
    "xattention": {"threshold": 0.6, "block_size": 16, "stride": 4},
    "minference": {"vertical_size": 16, "slash_size": 16, "block_size": 16, "last_queries": 20},
    "flexprefill": {"gamma": 0.7, "tau": 0.25, "min_budget": 16, "block_size": 16},
    "moba": {"chunk_size": 12, "top_k": 2},
    "infllm": {
        "block_size": 16, "top_k": 3, "local_tokens": 16, "window": 8, "stride": 4,
    },
}  # fmt: skip
PER_TOKEN = {"moba": SYSTEMS["moba"], "infllm": SYSTEMS["infllm"]}
every_system = pytest.mark.parametrize(("name", "options"), SYSTEMS.items(), ids=SYSTEMS)


def put(model: Any, name: str, options: dict[str, Any]) -> Any:
    return apply(model, name.split()[0], **options, dense_len=0)


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    return model(**kwargs).logits


def float32_loss(model: Any, batch: dict[str, Tensor]) -> float:
    """What the dense model loses by computing in float32."""
    exact = logits(copy.deepcopy(model).double(), **batch)
    return float((logits(model, **batch) - exact).abs().max())


@every_system
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_items_alone(
    lm: SimpleNamespace, name: str, options: dict[str, Any], side: str
) -> None:
    model = lm.model(num_hidden_layers=1 if side == "right" else 2)
    sequences = [lm.ids(83, 1), lm.ids(58, 2), lm.ids(17, 3)]
    batch = lm.pad(sequences, side)
    allowed = 4 * float32_loss(model, batch)
    dense = lm.real_rows(batch, logits(model, **batch))
    recorder = put(model, name, options).record_density()
    together = lm.real_rows(batch, logits(model, **batch))
    assert 0.1 < recorder.density() < 0.95
    for sequence, ours, without in zip(sequences, together, dense, strict=True):
        alone = logits(model, input_ids=sequence)
        assert (ours - alone).abs().max() <= allowed
        if sequence.shape[1] == 83:
            assert (ours - without).abs().max() > 100 * allowed  # the system was at work


@every_system
def test_generation_of_a_padded_batch_equals_that_of_its_items(
    lm: SimpleNamespace, name: str, options: dict[str, Any]
) -> None:
    model = lm.model("qwen3")
    put(model, name, options)
    sequences = [lm.ids(61, 1), lm.ids(40, 2)]
    batch = lm.pad(sequences, "left")
    del batch["position_ids"]
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    together = model.generate(**batch, **settings)[:, -3:]
    alone = [model.generate(x, attention_mask=torch.ones_like(x), **settings)[:, -3:] for x in sequences]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "infllm"])
def test_decoding_is_dense_over_what_the_prompt_left_in_the_cache(lm: SimpleNamespace, name: str) -> None:
    model = lm.model()
    prompt, token = {"input_ids": lm.ids(70, 1)}, lm.ids(1, 2)
    with torch.no_grad():
        put(model, name, SYSTEMS[name])
        cache = model(**prompt).past_key_values
        untouched = copy.deepcopy(cache)
        ours = model(token, past_key_values=cache).logits
        remove(model)
        assert torch.equal(ours, model(token, past_key_values=untouched).logits)


@pytest.mark.parametrize(("name", "options"), PER_TOKEN.items(), ids=PER_TOKEN)
def test_a_prompt_in_chunks_equals_the_whole_where_each_token_chooses_alone(
    lm: SimpleNamespace, name: str, options: dict[str, Any]
) -> None:
    model, ids = lm.model(), lm.ids(83, 1)
    allowed = 4 * float32_loss(model, {"input_ids": ids})
    put(model, name, options)
    whole = logits(model, input_ids=ids)
    with torch.no_grad():
        first = model(ids[:, :39])
        second = model(ids[:, 39:], past_key_values=first.past_key_values)
    assert (torch.cat([first.logits, second.logits], dim=1) - whole).abs().max() <= allowed


@pytest.mark.parametrize("name", ["draft", "xattention", "minference", "flexprefill"])
def test_a_prompt_in_chunks_of_whole_blocks_is_served(lm: SimpleNamespace, name: str) -> None:
    """Block rules see other queries in other chunks; a rule that keeps everything must still equal dense."""
    model, ids = lm.model(), lm.ids(83, 1)
    allowed = 4 * float32_loss(model, {"input_ids": ids})
    dense = logits(model, input_ids=ids)
    everything = {
        "draft": {"density": 1.0},
        "draft with residual": {"density": 0.5, "block_size": 16, "residual": True},
        "xattention": {"threshold": 1.0},
        "minference": {"vertical_size": 999},
        "flexprefill": {"min_budget": 999, "tau": 0.0},
    }
    put(model, name, {**SYSTEMS[name], **everything[name]})
    for cut in (32, 39):
        with torch.no_grad():
            first = model(ids[:, :cut])
            second = model(ids[:, cut:], past_key_values=first.past_key_values)
        assert (torch.cat([first.logits, second.logits], dim=1) - dense).abs().max() <= allowed


def test_infllm_decodes_as_it_reads(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(80, 1)
    allowed = 4 * float32_loss(model, {"input_ids": ids})
    put(model, "infllm", SYSTEMS["infllm"])
    whole = logits(model, input_ids=ids)
    with torch.no_grad():
        step = model(ids[:, :73])
        for position in range(73, 80):
            step = model(ids[:, position : position + 1], past_key_values=step.past_key_values)
            assert (step.logits[:, 0] - whole[:, position]).abs().max() <= allowed
