"""MoBA equals a masked softmax whose mask follows the rule, token by token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels import gathered_choice, gathered_merge, gathered_queries
from draftattn.pipelines.llm import apply, moba
from draftattn.pipelines.llm.dense import dense_attention
from draftattn.pipelines.llm.moba import MobaConfig, _chunk_blocks, _own_mask, moba_attention, moba_pairs


def rule(query: Tensor, key: Tensor, chunk_size: int, top_k: int, force_first: bool) -> Tensor:
    """The mask ``[B, H, N, K]`` by loops over tokens."""
    batch, num_queries, heads, _ = query.shape
    num_keys, group = key.shape[1], heads // key.shape[2]
    seen = torch.zeros(batch, heads, num_queries, num_keys, dtype=torch.bool)
    for item in range(batch):
        for head in range(heads):
            keys = key[item, :, head // group].double().cpu()
            means = [keys[i : i + chunk_size].mean(0) for i in range(0, num_keys, chunk_size)]
            for row in range(num_queries):
                position = num_keys - num_queries + row
                own = position // chunk_size
                q = query[item, row, head].double().cpu()
                gate = {chunk: float(q @ means[chunk]) for chunk in range(own)}
                if force_first and own:
                    gate[0] = float("inf")
                for chunk in sorted(gate, key=lambda c: -gate[c])[: top_k - 1]:
                    seen[item, head, row, chunk * chunk_size : (chunk + 1) * chunk_size] = True
                seen[item, head, row, own * chunk_size : position + 1] = True
    return seen.to(query.device)


def masked_softmax(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


CASES = [  # queries, keys, chunk size, top-k, first forced
    (70, 70, 8, 3, False),
    (70, 70, 8, 3, True),
    (30, 75, 8, 2, False),
    (5, 64, 8, 2, True),
    (65, 65, 20, 1, False),
    (330, 330, 140, 2, False),  # chunks of more than one block, the last one tiny
]


@pytest.mark.parametrize(("num_queries", "num_keys", "chunk_size", "top_k", "force_first"), CASES)
def test_moba_equals_a_masked_softmax_forward_and_backward(
    lm: SimpleNamespace, num_queries: int, num_keys: int, chunk_size: int, top_k: int, force_first: bool
) -> None:
    torch.manual_seed(0)
    batch, heads, kv_heads = (2, 4, 2) if num_keys < 100 else (1, 2, 1)
    query = torch.randn(batch, num_queries, heads, 16, device=lm.device)
    key, value = torch.randn(2, batch, num_keys, kv_heads, 16, device=lm.device)
    seen = rule(query, key, chunk_size, top_k, force_first)
    assert moba_pairs(num_queries, num_keys, chunk_size, top_k) * batch * heads == seen.sum()
    upstream = torch.randn_like(query)

    def run(function: object, dtype: torch.dtype) -> list[Tensor]:
        tensors = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        output = function(*tensors)  # type: ignore[operator]
        return [output, *torch.autograd.grad(output, tensors, upstream.to(dtype))]

    exact = run(lambda *x: masked_softmax(*x, seen), torch.float64)
    torchs = run(lambda *x: masked_softmax(*x, seen), torch.float32)
    options = {"chunk_size": chunk_size, "top_k": top_k, "force_first": force_first}
    ours = run(lambda *x: moba_attention(*x, **options), torch.float32)
    for name, mine, theirs, truth in zip(("output", "query", "key", "value"), ours, torchs, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7, name


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1500, 1500), (333, 1201), (5, 700)])
@pytest.mark.parametrize(("chunk_size", "top_k"), [(8, 3), (140, 2), (256, 1), (300, 4)])
def test_the_blocks_of_own_chunks(
    lm: SimpleNamespace, num_queries: int, num_keys: int, chunk_size: int, top_k: int
) -> None:
    key_offsets, key_chunk = _chunk_blocks(0, num_keys, chunk_size, lm.device)
    query_offsets, chunk = _chunk_blocks(num_keys - num_queries, num_keys, chunk_size, lm.device)
    mask = _own_mask(num_queries, num_keys, chunk_size, top_k, torch.device(lm.device))
    assert torch.equal(mask.query_offsets, query_offsets)
    assert torch.equal(mask.key_offsets, key_offsets)
    chunk = chunk[:, None]
    own = (key_chunk == chunk) | ((key_chunk < chunk) & (chunk < top_k))
    assert torch.equal(mask.block_map, own[None, None])


@pytest.mark.parametrize(("num_queries", "num_keys", "chunk_size", "top_k", "force_first"), CASES)
@pytest.mark.parametrize("pairs", [30, 100, 10**6])  # of a query and a chunk that are gathered at once
def test_without_gradients_parts_of_any_size_give_the_same(
    lm: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    pairs: int,
    num_queries: int,
    num_keys: int,
    chunk_size: int,
    top_k: int,
    force_first: bool,
) -> None:
    """The kernels of a GPU, interpreted where there is none, in parts of items, tokens and heads."""
    pytest.importorskip("triton")
    for module in (gathered_choice, gathered_queries, gathered_merge):
        monkeypatch.setattr(module, "triton_serves", lambda x: True)
    torch.manual_seed(0)
    heads, kv_heads = 6, 2
    monkeypatch.setattr(moba, "_GATHERED_BYTES", pairs * 16 * 4 * heads // kv_heads)
    query = torch.randn(2, heads, num_queries, 16, device=lm.device).transpose(1, 2)
    key = torch.randn(2, num_keys, kv_heads, 16, device=lm.device)
    value = torch.randn(2, kv_heads, num_keys, 16, device=lm.device).transpose(1, 2)
    seen = rule(query, key, chunk_size, top_k, force_first)
    exact = masked_softmax(query.double(), key.double(), value.double(), seen)
    torchs = masked_softmax(query, key, value, seen)
    given = [x.clone() for x in (query, key, value)]
    with torch.inference_mode():
        ours = moba_attention(query, key, value, chunk_size=chunk_size, top_k=top_k, force_first=force_first)
    assert (ours - exact).norm() <= 2 * (torchs - exact).norm() + 1e-7
    assert all(torch.equal(a, b) for a, b in zip(given, (query, key, value), strict=True))


def test_as_many_chunks_as_there_are_is_full_attention_bit_for_bit(lm: SimpleNamespace) -> None:
    query = torch.randn(1, 50, 4, 16, device=lm.device)
    key, value = torch.randn(2, 1, 50, 2, 16, device=lm.device)
    full = dense_attention(query, key, value, 0.25)
    assert torch.equal(moba_attention(query, key, value, chunk_size=10, top_k=5, scale=0.25), full)
    assert not torch.equal(moba_attention(query, key, value, chunk_size=10, top_k=4, scale=0.25), full)


@pytest.mark.parametrize(("batch", "num_queries"), [(0, 50), (2, 0), (0, 0)])
def test_nothing_gives_nothing(lm: SimpleNamespace, batch: int, num_queries: int) -> None:
    query = torch.randn(batch, num_queries, 4, 16, device=lm.device)
    key = torch.randn(batch, 50, 2, 16, device=lm.device)
    assert moba_attention(query, key, key, chunk_size=8, top_k=2).shape == query.shape


def test_density_is_counted(lm: SimpleNamespace) -> None:
    model = lm.model()
    recorder = apply(model, "moba", chunk_size=8, top_k=2).record_density()
    with torch.no_grad():
        model(lm.ids(40))
    assert recorder.density() == moba_pairs(40, 40, 8, 2) / 820


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="chunk_size is 0"):
        MobaConfig(chunk_size=0)
    with pytest.raises(InputError, match="top_k is 1; it must be at least 2"):
        MobaConfig(top_k=1, force_first=True)
