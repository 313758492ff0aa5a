"""InfLLM v2 against its rule, written as loops over tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels import single_query_scores
from draftattn.kernels.backends import triton_interpreted
from draftattn.pipelines.llm.infllm import InfLLMConfig, infllm_attention, infllm_mask

SMALL = InfLLMConfig(block_size=16, top_k=4, local_tokens=32, window=8, stride=4)


def rule(query: Tensor, key: Tensor, config: InfLLMConfig) -> Tensor:
    """The mask ``[B, H, N, K]``, for a query block of 1."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    group, block = heads // kv_heads, config.block_size
    starts = range(0, num_keys - config.window + 1, config.stride)
    seen = torch.zeros(batch, heads, num_queries, num_keys, dtype=torch.bool)
    for item in range(batch):
        for kv_head in range(kv_heads):
            keys = key[item, :, kv_head].double().cpu()
            windows = [keys[start : start + config.window].mean(0) for start in starts]
            of_group = slice(kv_head * group, (kv_head + 1) * group)
            for row in range(num_queries):
                position = num_keys - num_queries + row
                own = position // block
                past = [i for i, start in enumerate(starts) if start + config.window <= position + 1]
                mass = dict.fromkeys(range(len(windows)), 0.0)
                for q in query[item, row, of_group].double().cpu() if past else []:
                    shares = (torch.stack([windows[i] for i in past]) @ q * head_dim**-0.5).softmax(0)
                    for i, share in zip(past, shares.tolist(), strict=True):
                        mass[i] += share
                score = {}
                for b in range(own + 1):
                    # every window that shares a token with the block
                    touching = [
                        mass[i]
                        for i, start in enumerate(starts)
                        if start < (b + 1) * block and start + config.window > b * block
                    ]
                    score[b] = max(touching, default=0.0)
                    if b < config.initial_blocks or b > own - config.local_tokens // block:
                        score[b] = float("inf")
                for b in sorted(score, key=lambda b: -score[b])[: config.top_k]:
                    seen[item, of_group, row, b * block : min((b + 1) * block, position + 1)] = True
    return seen.to(query.device)


def masked_softmax(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def tensors(lm: SimpleNamespace, num_queries: int, num_keys: int) -> list[Tensor]:
    torch.manual_seed(1)
    query = torch.randn(2, num_queries, 4, 16, device=lm.device) * 2
    return [query, *torch.randn(2, 2, num_keys, 2, 16, device=lm.device)]


@pytest.mark.parametrize(("num_queries", "num_keys"), [(150, 150), (40, 170), (1, 131), (20, 20), (3, 5)])
@pytest.mark.parametrize("initial_blocks", [0, 2])
def test_it_equals_a_masked_softmax(lm: SimpleNamespace, num_queries: int, num_keys: int, initial_blocks: int) -> None:
    config = replace(SMALL, initial_blocks=initial_blocks)
    query, key, value = tensors(lm, num_queries, num_keys)
    seen = rule(query, key, config)
    exact = masked_softmax(query.double(), key.double(), value.double(), seen)
    torchs = masked_softmax(query, key, value, seen)
    ours = infllm_attention(query, key, value, config)
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-7


@pytest.mark.parametrize("num_keys", [6, 8, 131, 400])
def test_one_query_chooses_alike_in_triton_and_beside_others(
    lm: SimpleNamespace, num_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, _ = tensors(lm, 2, num_keys)
    two = infllm_mask(query, key, SMALL, scale=0.25).block_map[:, :, 1:]
    one = infllm_mask(query[:, 1:], key, SMALL, scale=0.25)
    assert torch.equal(one.block_map, two)
    pytest.importorskip("triton")
    if lm.device.type == "cuda" or triton_interpreted():
        monkeypatch.setattr(single_query_scores, "_kernel_serves", lambda query, key: True)
        assert torch.equal(infllm_mask(query[:, 1:], key, SMALL, scale=0.25).block_map, two)


def test_chunks_of_scores_change_nothing(lm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = tensors(lm, 90, 90)
    whole = infllm_mask(query, key, SMALL, scale=0.25).kv_indices
    monkeypatch.setattr("draftattn.pipelines.llm.infllm._CHUNK_SCORES", 100)
    assert torch.equal(infllm_mask(query, key, SMALL, scale=0.25).kv_indices, whole)


def test_neighbours_choose_together_by_their_mean(lm: SimpleNamespace) -> None:
    query, key, value = tensors(lm, 61, 61)
    alike = query[:, :60:5].repeat_interleave(5, dim=1)
    query = torch.cat([alike, query[:, 60:]], dim=1)
    shared = infllm_mask(query, key, replace(SMALL, query_block=5), scale=0.25)
    alone = infllm_mask(query, key, SMALL, scale=0.25)
    # a block of equal queries chooses what its last one would, alone
    last = torch.tensor([*range(4, 60, 5), 60], device=lm.device)
    assert torch.equal(shared.block_map, alone.block_map[:, :, last])
    assert infllm_attention(query, key, value, replace(SMALL, query_block=5)).isfinite().all()


def test_gradients_flow_through_the_chosen_blocks(lm: SimpleNamespace) -> None:
    query, key, value = tensors(lm, 70, 70)
    seen = rule(query, key, SMALL)

    def gradients(function: Any) -> list[Tensor]:
        given = [x.clone().requires_grad_() for x in (query, key, value)]
        return list(torch.autograd.grad(function(*given).square().sum(), given))

    ours = gradients(lambda *x: infllm_attention(*x, SMALL))
    torchs = gradients(lambda *x: masked_softmax(*x, seen))
    for mine, theirs in zip(ours, torchs, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_places_kept_from_inference_serve_gradients(lm: SimpleNamespace) -> None:
    query, key, value = tensors(lm, 51, 77)
    with torch.inference_mode():
        first = infllm_attention(query, key, value, SMALL)
    query = query.requires_grad_()
    second = infllm_attention(query, key, value, SMALL)
    assert torch.allclose(first, second, atol=1e-6)
    second.sum().backward()
    assert query.grad is not None
    places = infllm_mask(query, key, SMALL, scale=0.25)
    assert not places.query_offsets.is_inference()
    assert not places.key_offsets.is_inference()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 16, "stride": 16}, "window is 16 and stride 16"),
        ({"block_size": 40}, "block_size is 40"),
        ({"local_tokens": 100}, "local_tokens is 100"),
        ({"top_k": 32}, "top_k is 32 and initial_blocks 1"),
        ({"query_block": 0}, "query_block is 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        InfLLMConfig(**options)
