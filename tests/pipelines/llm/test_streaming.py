"""StreamingLLM against the published algorithm, written out: keys without positions, rotated by index in the cache."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from draftattn.errors import InputError
from draftattn.pipelines.llm import AutoModelForCausalLM, SinkCache, apply, remove
from draftattn.pipelines.llm.streaming_attention import streaming_attention
from draftattn.pipelines.llm.streaming_config import StreamingConfig
from draftattn.pipelines.llm.streaming_ring import Ring
from draftattn.pipelines.llm.streaming_rotary import rotary_turn

SINK, WINDOW = 3, 9

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, no groups": ("llama", {"num_key_value_heads": 4}),
    "llama3 scaling": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "linear scaling": ("llama", {"rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": SINK + WINDOW + 1}),
}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def turned(x: Tensor, positions: Tensor, rotary: Any) -> Tensor:
    """Rotary embedding of ``[n, heads, D]`` in the precision of ``x``."""
    angles = positions[:, None].to(x.dtype) * rotary.inv_freq.to(x.dtype)
    cos, sin = (f(torch.cat([angles, angles], -1))[:, None] * rotary.attention_scaling for f in (torch.cos, torch.sin))
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def literal_logits(model: PreTrainedModel, ids: Tensor, sink: int, window: int, dtype: torch.dtype) -> Tensor:
    """Token by token; every layer keeps keys without positions and forgets the oldest that is no sink."""
    model = copy.deepcopy(model).to(dtype)
    decoder: Any = model.model
    held: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in decoder.layers]
    logits = []
    for token in ids[0]:
        hidden = decoder.embed_tokens(token[None])
        for layer, (keys, values) in zip(decoder.layers, held, strict=True):
            own, x = layer.self_attn, layer.input_layernorm(hidden)
            query, key, value = (f(x).view(-1, own.head_dim) for f in (own.q_proj, own.k_proj, own.v_proj))
            if hasattr(own, "q_norm"):
                query, key = own.q_norm(query), own.k_norm(key)
            keys.append(key)
            values.append(value)
            places = torch.arange(len(keys), device=ids.device)
            k = turned(torch.stack(keys), places, decoder.rotary_emb).repeat_interleave(own.num_key_value_groups, 1)
            v = torch.stack(values).repeat_interleave(own.num_key_value_groups, 1)
            q = turned(query[None], places[-1:], decoder.rotary_emb)[0]
            weights = (torch.einsum("hd,khd->hk", q, k) * own.scaling).softmax(-1)
            hidden = hidden + own.o_proj(torch.einsum("hk,khd->hd", weights, v).flatten()[None])
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if len(keys) > sink + window:
                del keys[sink], values[sink]
        logits.append(model.lm_head(decoder.norm(hidden)))
    return torch.stack(logits, 1)


def in_chunks(model: PreTrainedModel, ids: Tensor, chunks: list[int], cache: Any = None, **inputs: Tensor) -> Tensor:
    """Logits of a text given in chunks, the last size again and again."""
    logits, start = [], 0
    while start < ids.shape[1]:
        size = chunks[len(logits)] if len(logits) < len(chunks) else chunks[-1]
        part = {name: x[:, : start + size] if name == "attention_mask" else x[:, start : start + size]
                for name, x in inputs.items()}  # fmt: skip
        output = model(ids[:, start : start + size], past_key_values=cache, use_cache=True, **part)
        cache = output.past_key_values
        logits.append(output.logits)
        start += size
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_literal_algorithm(variant: str, lm: SimpleNamespace) -> None:
    family, settings = VARIANTS[variant]
    model, ids = lm.model(family, **settings), lm.ids(45)
    exact = literal_logits(model, ids, SINK, WINDOW, torch.float64)
    bound = 2 * rms(literal_logits(model, ids, SINK, WINDOW, torch.float32) - exact)
    dense = model(ids).logits
    results = {"stock, by token": in_chunks(model, ids, [SINK + WINDOW, 1], SinkCache(model, sink=SINK, window=WINDOW))}
    with apply(model, "streaming", sink=SINK, window=WINDOW):
        results["whole"] = model(ids, use_cache=False).logits
        results["whole, with a cache"] = model(ids).logits
        results["by token"] = in_chunks(model, ids, [1])
        results["chunks"] = in_chunks(model, ids, [2, 5, 17, 1, 3, 1])
        results["prompt longer than the window"] = in_chunks(model, ids, [30, 1])
    for name, logits in results.items():
        assert rms(logits - exact) <= bound, name
    assert rms(dense - exact) > 1000 * bound  # what is forgotten matters
    assert torch.equal(model(ids).logits, dense)


def test_the_exact_form_of_attention_by_loop(lm: SimpleNamespace) -> None:
    """One call over several kernel blocks: groups, padding full of NaN, old sinks in front, gradients."""
    config, turn = StreamingConfig(sink=5, window=100), rotary_turn(lm.model())
    num_sinks, kept, length, seen, padding = 5, 100, 180, 140, [0, 35, 37]
    device = lm.device
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, n, heads, 16, generator=generator).to(device)
        for n, heads in ((length, 4), (num_sinks + kept + length, 2), (num_sinks + kept + length, 2))
    )
    for item, before in enumerate(padding):  # real tokens older than the window are sinks, the last places first
        hidden = num_sinks - min(num_sinks, seen - kept - before)
        key[item, :hidden] = value[item, :hidden] = torch.nan

    def loop(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
        rows = []
        for item, before in enumerate(padding):
            q, k, v = (x[item].to(dtype) for x in (query, key, value))
            away = max(0, seen - before - config.size)
            place = {}  # index in `key` of every token still there
            older = seen - kept - before
            for token in range(min(older, num_sinks)):
                place[token] = num_sinks - min(older, num_sinks) + token
            for token in range(older, seen + length - before):
                place[token] = num_sinks + token - older
            for row in range(length):
                own = seen - before + row
                near = [place[t] for t in range(max(0, own - config.window), own + 1)]
                far = [place[t] for t in range(config.sink) if t < own - config.window]
                forgotten = max(0, own - config.size) - away
                keys = torch.cat([turn(k[far][None], [forgotten])[0], k[near]]).repeat_interleave(2, 1)
                weights = (torch.einsum("hd,khd->hk", q[row], keys) * 0.3).softmax(-1)
                rows.append(torch.einsum("hk,khd->hd", weights, v[far + near].repeat_interleave(2, 1)))
        return torch.stack(rows).unflatten(0, (3, length))

    inputs = [x.requires_grad_() for x in (query, key, value)]
    exact, rough = (loop(*inputs, dtype) for dtype in (torch.float64, torch.float32))
    weight = torch.randn(exact.shape, generator=generator).to(device)
    exact_gradients = torch.autograd.grad((exact * weight).sum(), inputs, retain_graph=True)
    rough_gradients = torch.autograd.grad((rough * weight).sum(), inputs)
    output = streaming_attention(*inputs, config, turn, seen=seen, num_sinks=num_sinks, padding=padding, scale=0.3)
    gradients = torch.autograd.grad((output * weight).sum(), inputs)
    assert rms(output - exact) <= 2 * rms(rough - exact)
    for own, true, simple in zip(gradients, exact_gradients, rough_gradients, strict=True):
        assert rms((own - true).nan_to_num()) <= 3 * rms((simple - true).nan_to_num())


def streamed_alone(model: PreTrainedModel, text: Tensor) -> tuple[Tensor, float]:
    """Logits of one text in float64, and twice what float32 loses."""
    exact = copy.deepcopy(model).double()
    with apply(exact, "streaming", sink=SINK, window=WINDOW), apply(model, "streaming", sink=SINK, window=WINDOW):
        logits = exact(text).logits
        return logits, 2 * rms(model(text).logits - logits)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[4, 1], [23, 1], [23, 6, 1], [8, 11]], ids=str)
def test_a_padded_batch_equals_its_items_alone(chunks: list[int], lm: SimpleNamespace) -> None:
    model = lm.model()
    texts = [lm.ids(length, seed=length) for length in (34, 29, 16)]
    exact, bounds = zip(*(streamed_alone(model, text) for text in texts), strict=True)
    batch = lm.pad(texts, "left")
    ids, mask = batch.pop("input_ids"), batch["attention_mask"]
    with apply(model, "streaming", sink=SINK, window=WINDOW):
        results = [in_chunks(model, ids, chunks, **batch), model(ids, use_cache=False, **batch).logits]
    if chunks == [4, 1]:
        cache = SinkCache(model, sink=SINK, window=WINDOW, attention_mask=mask[:, :20])
        results.append(in_chunks(model, ids, [12, 1], cache, **batch))
    for logits in results:
        for item, text in enumerate(texts):
            assert rms(logits[item : item + 1, -text.shape[1] :] - exact[item]) <= bounds[item]


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_and_nothing_can_follow_it(lm: SimpleNamespace) -> None:
    model = lm.model()
    texts = [lm.ids(length, seed=length) for length in (34, 21)]
    batch = lm.pad(texts, "right")
    exact, bounds = zip(*(streamed_alone(model, text) for text in texts), strict=True)
    with apply(model, "streaming", sink=SINK, window=WINDOW):
        output = model(**batch)
        for item, logits in enumerate(lm.real_rows(batch, output.logits)):
            assert rms(logits - exact[item]) <= bounds[item]
        with pytest.raises(InputError, match="padded on the right"):
            model(lm.ids(1).expand(2, 1), past_key_values=output.past_key_values)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_of_a_padded_batch_equals_its_items_alone(beams: int, lm: SimpleNamespace) -> None:
    model = lm.model()
    settings = {"max_new_tokens": 25, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    prompts = [lm.ids(length, seed=length) for length in (28, 8, 3)]
    batch = lm.pad(prompts, "left")
    with apply(model, "streaming", sink=SINK, window=WINDOW):
        together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
        for item, prompt in enumerate(prompts):
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
            assert torch.equal(together[item, -25:], alone[0, -25:])
    cache = SinkCache(model, sink=SINK, window=WINDOW)
    ones = torch.ones_like(prompts[1])
    stock = model.generate(prompts[1], attention_mask=ones, past_key_values=cache, **settings)
    assert torch.equal(together[1, -25:], stock[0, -25:])


def bytes_of(holder: Any) -> int:
    """Memory of the tensors that an object and the objects it is made of hold, each piece counted once."""
    pieces, open_ones = {}, [holder]
    while open_ones:
        for x in vars(open_ones.pop()).values():
            if isinstance(x, Tensor):
                pieces[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            elif isinstance(x, Ring):
                open_ones.append(x)
    return sum(pieces.values())


@torch.no_grad()
def test_memory_is_constant(lm: SimpleNamespace) -> None:
    model = lm.model(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    cache = SinkCache(model, sink=4, window=60)
    token, storage = lm.ids(1), set()
    held = cache.layers[0]
    for step in range(1500):
        logits = model(token, past_key_values=cache).logits
        token = logits.argmax(-1)
        if step >= 64:
            storage.add(bytes_of(held))
        if step % 200 == 199:
            assert held.keys.shape == held.values.shape == (1, 1, 60, 32)
            assert held.sink_keys.shape == held.sink_values.shape == (1, 1, 4, 32)
            assert bytes_of(held) == 2 * (4 + 60) * 32 * 4
    assert cache.get_seq_length() == 1500
    assert len(storage) == 1
    # besides, one place more in both, and the sinks in the two forms that turning takes
    assert max(storage) <= 2 * (4 + 60 + 1 + 4 + 4) * 32 * 4


@torch.no_grad()
@pytest.mark.parametrize("sink", [4, 0])
def test_a_long_prompt_is_not_kept_alive(sink: int, lm: SimpleNamespace) -> None:
    model = lm.model(num_hidden_layers=1)
    with apply(model, "streaming", sink=sink, window=60):
        cache = model(lm.ids(1000)).past_key_values
    assert bytes_of(cache.layers[0]) == 2 * (sink + 60) * 2 * 16 * 4


@torch.no_grad()
def test_items_can_be_repeated_reordered_and_dropped(lm: SimpleNamespace) -> None:
    model = lm.model()
    batch = lm.pad([lm.ids(20), lm.ids(15, seed=1)], "left")
    order = torch.tensor([1, 0, 1], device=batch["input_ids"].device)
    following = lm.ids(4, seed=2)
    with apply(model, "streaming", sink=SINK, window=WINDOW):
        caches = [model(**batch).past_key_values for _ in range(3)]
        caches[0].batch_repeat_interleave(2)
        caches[0].batch_select_indices(torch.tensor([2, 1, 3]))
        caches[1].reorder_cache(order[:2])
        logits = [
            model(following.expand(n, -1), past_key_values=x).logits for x, n in zip(caches, (3, 2, 2), strict=True)
        ]
    assert torch.allclose(logits[0], logits[2][order], atol=1e-5)
    assert torch.allclose(logits[1], logits[2][order[:2]], atol=1e-5)
    assert not torch.allclose(logits[2][0], logits[2][1], atol=1e-2)
    caches[2].reset()
    assert caches[2].get_seq_length() == caches[2].num_held == 0
    assert caches[2].stream.padding is None


def test_density_is_that_of_the_tokens_seen(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(40)
    handle = apply(model, "streaming", sink=SINK, window=WINDOW)
    density = handle.record_density()
    for chunks in ([40], [7, 20, 1]):
        density.reset()
        in_chunks(model, ids, chunks)
        assert density.density() == pytest.approx(sum(min(i + 1, SINK + WINDOW + 1) for i in range(40)) / 820)


def test_a_drop_in_for_attention_sinks(lm: SimpleNamespace, tmp_path: Any) -> None:
    stock, ids = lm.model(), lm.ids(40)
    stock.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, attention_sink_size=SINK, attention_sink_window_size=WINDOW, device_map=stock.device
    )
    exact, bound = streamed_alone(stock, ids)
    assert rms(model(ids).logits - exact) <= bound
    remove(model)
    assert torch.equal(model(ids).logits, stock(ids).logits)
    with pytest.raises(InputError, match="window is 0"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attention_sink_window_size=0)
    with pytest.raises(OSError, match="from_pretrained"):
        AutoModelForCausalLM()


def test_remove_leaves_no_trace(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(40)
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    before = model(ids).logits
    apply(model, "streaming", sink=SINK, window=WINDOW)
    assert not torch.equal(model(ids).logits, before)
    remove(model)
    assert torch.equal(model(ids).logits, before)
    assert hooks == [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


def test_a_sink_cache_on_a_stock_model_refuses_what_attention_cannot_hide(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(40)
    fits = SINK + WINDOW + 1
    cache = SinkCache(model, sink=SINK, window=WINDOW)
    with pytest.raises(InputError, match=f"{fits + 1} tokens at once"):
        model(ids[:, : fits + 1], past_key_values=cache)
    cache.reset()
    model(ids[:, :fits], past_key_values=cache)
    with pytest.raises(InputError, match="2 tokens at once"):
        model(ids[:, :2], past_key_values=cache)
    cache.crop(0)
    with pytest.raises(InputError, match="3 tokens cannot be taken back"):
        cache.crop(-3)
    cache.reset()
    with apply(model, "streaming", sink=SINK, window=WINDOW):
        model(ids, past_key_values=cache)
    with pytest.raises(InputError, match="at once"):
        model(ids, past_key_values=cache)


def test_what_cannot_stream_is_refused(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(40)
    for options, message in (
        ({"sink": -1}, "sink is -1"),
        ({"window": 0}, "window is 0"),
        ({"dense_len": 8}, "dense_len is 8"),
        ({"dense_layers": (0,)}, "dense_layers"),
    ):
        with pytest.raises(InputError, match=message):
            apply(model, "streaming", **options)
    own = lm.model("mistral", sliding_window=32)
    with pytest.raises(InputError, match="together they may be 31"):
        apply(own, "streaming", sink=4, window=28)
    with pytest.raises(InputError, match="model is a LlamaConfig; it must be a model"):
        SinkCache(model.config)
    for rope in ("dynamic", "longrope"):
        other = lm.model()
        other.model.rotary_emb.rope_type = rope
        with pytest.raises(InputError, match=rope):
            SinkCache(other)
    other = lm.model()
    other.model.rotary_emb.forward = lambda x, position_ids: (
        2 * [position_ids[..., None].float().sqrt().expand(1, 2, 16)]
    )
    with pytest.raises(InputError, match="linearly"):
        SinkCache(other)
    del other.model.rotary_emb.inv_freq
    with pytest.raises(InputError, match="0 rotary embeddings"):
        SinkCache(other)
    with apply(model, "streaming", sink=SINK, window=WINDOW):
        used = DynamicCache()
        used.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
        with pytest.raises(InputError, match="DynamicCache of 3 tokens"):
            model(ids, past_key_values=used)
        with pytest.raises(InputError, match="they must agree"):
            model(ids, past_key_values=SinkCache(model, sink=1, window=2))
        with pytest.raises(InputError, match="mask of its own"):
            model(ids, attention_mask=torch.zeros(1, 1, 40, 40, device=ids.device))
        packed = torch.arange(20, device=ids.device).repeat(2)[None]
        with pytest.raises(InputError, match="packed"):
            model(ids, position_ids=packed, use_cache=False)
        gaps = torch.ones_like(ids)
        gaps[0, 5] = 0
        with pytest.raises(InputError, match="pad at the ends"):
            model(ids, attention_mask=gaps)
