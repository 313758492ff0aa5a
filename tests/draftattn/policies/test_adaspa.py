"""Exact search, budgets of heads, and when masks are reused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from draftattn import DraftConfig
from draftattn.inputs import AttentionInputs
from draftattn.policies import make_policy
from draftattn.policies.adaspa import AdaSpaConfig, AdaSpaPolicy, head_budgets
from draftattn.policies.oracle import OracleConfig
from draftattn.policy import CallContext, ObservingPolicy

Call = Callable[..., AttentionInputs]


def block_mass(call: AttentionInputs, item: int, head: int, lse_of: AttentionInputs | None = None) -> Tensor:
    """Exact mass of the video blocks ``[V, V]`` in float64, as shares of the softmax of another call's scores."""
    key = call.key[item, :, head // 2].double()
    scores = call.query[item, :, head].double() @ key.T / 4
    other = lse_of or call
    lse = (other.query[item, :, head].double() @ other.key[item, :, head // 2].double().T / 4).logsumexp(-1)
    probabilities = (scores - lse[:, None]).exp()
    edges, video = call.layout.offsets.tolist(), call.layout.num_video_blocks
    out = torch.zeros(video, video, dtype=torch.float64, device=call.query.device)
    for i, j in product(range(video), repeat=2):
        out[i, j] = probabilities[edges[i] : edges[i + 1], edges[j] : edges[j + 1]].sum(-1).mean()
    return out


def largest(mass: Tensor, count: int) -> list[set[int]]:
    return [set(row.topk(count).indices.tolist()) for row in mass]


def rows_of(block_map: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in block_map]


@pytest.mark.parametrize("text", [0, 23])
def test_the_oracle_keeps_the_largest_exact_mass(call: Call, text: int) -> None:
    inputs = call(batch=2, text=text)
    video = inputs.layout.num_video_blocks
    made = OracleConfig().make(DraftConfig(sparsity=0.7))(inputs, CallContext()).block_map[..., :video, :video]
    for item, head in product(range(2), range(4)):
        assert rows_of(made[item, head]) == largest(block_mass(inputs, item, head), 5)


class TestSearch:
    def test_heads_that_keep_most_give_blocks_to_those_that_keep_least(self, call: Call) -> None:
        inputs = call(heads=4, kv_heads=2)
        inputs.query[:, :, 1] *= 3  # peaked
        inputs.query[:, :, 2] *= 0.3  # flat
        made = AdaSpaConfig(high_recall=0.9).make(DraftConfig(sparsity=0.75))(inputs, CallContext()).block_map[0]
        masses = [block_mass(inputs, 0, head) for head in range(4)]
        lengths = inputs.layout.offsets.diff().double()
        recalls = [float(mass.topk(4).values.sum(-1) @ lengths / lengths.sum()) for mass in masses]
        assert recalls[1] > 0.9
        assert all(recalls[head] < 0.9 for head in (0, 2, 3))
        order = sorted(range(4), key=lambda head: recalls[head])
        counts = {head: 4 for head in range(4)} | {order[-1]: 2, order[0]: 6}
        for head in range(4):
            assert rows_of(made[head]) == largest(masses[head], counts[head])

    @pytest.mark.parametrize(
        ("recall", "kept", "expected"),
        [
            ([0.9, 0.85, 0.5, 0.6], 10, [5, 5, 15, 15]),
            ([0.9, 0.95, 0.99, 0.6], 10, [15, 5, 5, 15]),
            ([0.1, 0.2, 0.3, 0.4], 10, [10, 10, 10, 10]),
            ([0.9, 0.1, 0.2, 0.3], 18, [16, 20, 18, 18]),
            ([0.9, 0.1, 0.2, 0.3], 1, [1, 1, 1, 1]),
        ],
    )
    def test_budgets(self, recall: list[float], kept: int, expected: list[int]) -> None:
        found = head_budgets(torch.tensor([recall]), kept, 20, 0.8)
        assert found.tolist() == [expected]
        assert found.float().mean() == kept


class TestReuse:
    @pytest.fixture
    def policy(self) -> AdaSpaPolicy:
        # twenty steps: the first five dense, a search every eight
        return AdaSpaConfig(high_recall=1.0).make(DraftConfig(sparsity=0.7, warmup=0.25))

    @staticmethod
    def at(step: int | None, **place: Any) -> CallContext:
        return CallContext(**{"layer": 2, "step": step, "num_steps": 20, "branch": "cond", **place})

    def test_the_last_dense_step_is_searched_and_its_mask_reused(
        self, call: Call, policy: AdaSpaPolicy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert isinstance(policy, ObservingPolicy)
        calls = [call(seed=seed) for seed in range(4)]
        searched: list[int | None] = []
        search = AdaSpaPolicy._search

        def noted(self: AdaSpaPolicy, inputs: AttentionInputs, context: CallContext, *rest: Any) -> Any:
            searched.append(context.step)
            return search(self, inputs, context, *rest)

        monkeypatch.setattr(AdaSpaPolicy, "_search", noted)
        for step in range(5):
            policy.observe(calls[0 if step == 4 else 1], self.at(step))
        for step in range(5, 20):
            made = policy(calls[2], self.at(step)).block_map[0]
            if step < 12:
                expected = [largest(block_mass(calls[0], 0, head), 5) for head in range(4)]
            else:  # searched again, with the LSE of the dense step
                expected = [largest(block_mass(calls[2], 0, head, calls[0]), 5) for head in range(4)]
            assert [rows_of(made[head]) for head in range(4)] == expected
        assert searched == [4, 12]

    def test_layers_branches_and_runs_are_kept_apart(self, call: Call, policy: AdaSpaPolicy) -> None:
        first, second = call(seed=0), call(seed=1)
        run = object()
        of_first = policy(first, self.at(5, run=run)).block_map
        assert torch.equal(policy(second, self.at(6, run=run)).block_map, of_first)
        for place in ({"layer": 3}, {"branch": "uncond"}):
            assert not torch.equal(policy(second, self.at(6, run=run, **place)).block_map, of_first)
        assert not torch.equal(policy(second, self.at(6, run=object())).block_map, of_first)

    def test_an_earlier_step_tells_a_new_run_where_nothing_else_does(self, call: Call, policy: AdaSpaPolicy) -> None:
        first, second = call(seed=0), call(seed=1)
        of_first = policy(first, self.at(9)).block_map
        assert torch.equal(policy(second, self.at(9)).block_map, of_first)
        assert not torch.equal(policy(second, self.at(5)).block_map, of_first)

    def test_where_the_step_is_not_known_every_call_is_searched(self, call: Call, policy: AdaSpaPolicy) -> None:
        policy.observe(call(seed=0), self.at(None, num_steps=None))
        fresh = make_policy(DraftConfig(sparsity=0.7, policy=AdaSpaConfig(high_recall=1.0)))
        for seed in (1, 2):
            inputs = call(seed=seed)
            made = policy(inputs, self.at(None, num_steps=None)).block_map
            assert torch.equal(made, fresh(inputs, CallContext()).block_map)


def test_random_blocks_differ_by_layer_step_branch_and_seed(call: Call) -> None:
    inputs = call()
    places: list[dict[str, Any]] = [{}, {"layer": 1}, {"step": 1}, {"branch": "uncond"}]
    maps = [
        make_policy(DraftConfig(policy="random"))(
            inputs, CallContext(**{"step": 0, "branch": "cond", **place})
        ).block_map
        for place in places
    ]
    for i, j in product(range(len(maps)), repeat=2):
        assert torch.equal(maps[i], maps[j]) == (i == j)
    assert len(maps[0].flatten(0, 2).unique(dim=0)) > 8
