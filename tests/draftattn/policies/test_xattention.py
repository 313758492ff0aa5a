"""Antidiagonal scores and the choice by mass, written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from draftattn import DraftConfig, TokenGrid, antidiagonal
from draftattn.antidiagonal import antidiagonal_groups, antidiagonal_mass
from draftattn.inputs import AttentionInputs
from draftattn.policies.blocks import keep_mass, rank_in_row
from draftattn.policies.xattention import XAttentionConfig
from draftattn.policy import CallContext

Call = Callable[..., AttentionInputs]


def published_mass(query: Tensor, key: Tensor, block: int, stride: int) -> Tensor:
    """XAttention on one head of whole blocks: every antidiagonal of every stride × stride piece."""
    count = len(query) // stride
    scores = torch.zeros(count, count, dtype=torch.float64)
    full = query.double() @ key.double().T / query.shape[1] ** 0.5
    for a, b in product(range(count), repeat=2):
        piece = full[a * stride : (a + 1) * stride, b * stride : (b + 1) * stride]
        scores[a, b] = sum(piece[stride - 1 - r, r] for r in range(stride)) / stride
    shares = scores.softmax(-1)
    per_block = block // stride
    blocks = count // per_block
    out = torch.zeros(blocks, blocks, dtype=torch.float64)
    for i, j in product(range(blocks), repeat=2):
        out[i, j] = shares[i * per_block : (i + 1) * per_block, j * per_block : (j + 1) * per_block].sum(-1).mean()
    return out


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("chunk", [2**26, 1])
def test_whole_blocks_equal_the_published_sums(monkeypatch: pytest.MonkeyPatch, stride: int, chunk: int) -> None:
    monkeypatch.setattr(antidiagonal, "_CHUNK_SCORES", chunk)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 64, 4, 8, generator=generator), torch.randn(2, 64, 2, 8, generator=generator)
    groups = antidiagonal_groups(torch.arange(0, 65, 16), 16, stride)
    found = antidiagonal_mass(query, key, groups)
    for item, head in product(range(2), range(4)):
        expected = published_mass(query[item, :, head], key[item, :, head // 2], 16, stride)
        torch.testing.assert_close(found[item, head].double(), expected, atol=1e-6, rtol=1e-5)


def test_ragged_blocks_are_covered_evenly() -> None:
    offsets = torch.tensor([0, 16, 21, 22, 35])
    groups = antidiagonal_groups(offsets, 16, 4)
    assert groups.size.sum(-1).tolist() == offsets.diff().tolist()
    for block, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        taken = groups.tokens[block][groups.size[block] > 0].flatten()
        assert len(taken) == math.ceil((last - first) / 4) * 4
        # every token is taken, in order, once or twice (a single one four times)
        assert taken.unique().tolist() == list(range(first, last))
        assert (taken.diff() >= 0).all()


def test_ragged_blocks_of_equal_tokens_get_the_mass_they_hold() -> None:
    """Where all keys are alike every key weighs the same, so a block holds the share of its tokens."""
    offsets = torch.tensor([0, 16, 21, 22, 35])
    query, key = torch.randn(1, 35, 1, 8), torch.ones(1, 35, 1, 8)
    shares = antidiagonal_mass(query, key, antidiagonal_groups(offsets, 16, 4))
    torch.testing.assert_close(shares, (offsets.diff() / 35).expand(1, 1, 4, 4))


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 1.0])
def test_the_fewest_entries_that_hold_the_mass(mass: float) -> None:
    shares = torch.rand(3, 2, 5, 17, generator=torch.Generator().manual_seed(0)).square().softmax(-1)
    kept = keep_mass(shares, mass)
    for row, chosen in zip(shares.flatten(0, -2), kept.flatten(0, -2), strict=True):
        best = row.sort(descending=True).values.cumsum(0)
        fewest = next((i + 1 for i in range(17) if best[i] >= mass * best[-1]), 17)
        assert int(chosen.sum()) == fewest
        assert row[chosen].min() >= row[~chosen].max() if fewest < 17 else True


def test_equal_entries_are_ranked_in_order() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0]])
    assert rank_in_row(scores).tolist() == [[2, 0, 3, 1, 4]]
    assert keep_mass(torch.full((1, 4), 0.25), 0.5).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("mass", [0.3, 0.8])
def test_the_policy_keeps_that_mass_of_the_video(call: Call, mass: float) -> None:
    inputs = call(TokenGrid(3, 8, 10), text=23, batch=2, lengths=[3, 23])
    video = inputs.layout.num_video_blocks
    made = XAttentionConfig(mass, 4).make(DraftConfig(sparsity=0.1))(inputs, CallContext()).block_map
    for item, head in product(range(2), range(4)):
        query, key = (x[item, : 20 * video].cpu() for x in (inputs.query[:, :, head], inputs.key[:, :, head // 2]))
        shares = published_mass(query, key, 20, 4)
        for row in range(video):
            expected: set[int] = set()
            best = shares[row].argsort(descending=True).tolist()
            while sum(shares[row, b] for b in expected) < mass:
                expected.add(best[len(expected)])
            assert set(made[item, head, row, :video].nonzero().flatten().tolist()) == expected
