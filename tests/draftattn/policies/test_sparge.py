"""SpargeAttn's first stage, written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from draftattn import DraftConfig
from draftattn.inputs import AttentionInputs
from draftattn.policies.sparge import SpargeConfig, self_similarity
from draftattn.policy import CallContext

Call = Callable[..., AttentionInputs]


def similarity_of(tokens: Tensor) -> float:
    """Mean cosine similarity over all pairs of tokens, each with itself too."""
    return float(cosine_similarity(tokens[:, None], tokens[None], dim=-1).mean())


def test_self_similarity_is_the_mean_over_all_pairs(call: Call) -> None:
    inputs = call()
    found = self_similarity(inputs.key, inputs.layout)
    edges = inputs.layout.offsets.tolist()
    for head, block in product(range(2), range(inputs.layout.num_blocks)):
        tokens = inputs.key[0, edges[block] : edges[block + 1], head].double()
        assert float(found[0, head, block]) == pytest.approx(similarity_of(tokens), abs=1e-5)


@pytest.mark.parametrize("mass", [0.4, 0.9])
@pytest.mark.parametrize("similarity", [-1.0, 0.6])
def test_blocks_that_are_alike_are_chosen_by_their_means_and_others_kept(
    call: Call, mass: float, similarity: float
) -> None:
    inputs = call(batch=2)
    inputs.query[:, 20:40] = torch.randn_like(inputs.query[:, 20:40])  # no direction in common
    inputs.key[:, 60:80] = torch.randn_like(inputs.key[:, 60:80])
    made = SpargeConfig(mass, similarity).make(DraftConfig())(inputs, CallContext()).block_map
    edges, blocks = inputs.layout.offsets.tolist(), range(inputs.layout.num_blocks)
    gates = 0
    for item, head in product(range(2), range(4)):
        query = inputs.query[item, :, head].double()
        key = inputs.key[item, :, head // 2].double()
        smooth = key - key.mean(0)
        parts = [slice(edges[b], edges[b + 1]) for b in blocks]
        alike = [similarity_of(smooth[part]) > similarity for part in parts]
        for row in blocks:
            mean = query[parts[row]].mean(0)
            if similarity_of(query[parts[row]]) <= similarity:
                expected = set(blocks)
            else:
                scores = {b: float(mean @ key[parts[b]].mean(0)) / 4 for b in blocks if alike[b]}
                weights = {b: math.exp(score) * (parts[b].stop - parts[b].start) for b, score in scores.items()}
                expected = {b for b in blocks if not alike[b]}
                total = 0.0
                for i, b in enumerate(sorted(weights, key=lambda b: -weights[b])):
                    total += weights[b] / sum(weights.values())
                    if i == 0 or total <= mass:
                        expected.add(b)
            gates += expected == set(blocks)
            assert set(made[item, head, row].nonzero().flatten().tolist()) == expected
    assert (gates > 0) == (similarity > 0)
