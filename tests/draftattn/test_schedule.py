"""Sparsity by layer and step."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from draftattn import DraftConfig, InputError, TokenGrid, block_layout
from draftattn.inputs import AttentionInputs
from draftattn.policies import make_policy
from draftattn.policy import CallContext
from draftattn.schedule import SparsitySchedule, growing_schedule, growing_sparsity

TWO_RANGES = SparsitySchedule(steps=(0.3, 1.0), sparsity=(0.5, (0.9, 0.25)))


def test_every_step_belongs_to_one_range() -> None:
    schedule = SparsitySchedule((0.3, 0.6, 1.0), (0.1, 0.2, 0.3))
    for num_steps in (1, 3, 7, 10, 50):
        seen = [schedule.at(0, step, num_steps) for step in range(num_steps)]
        assert seen == [(0.1, 0.2, 0.3)[(10 * step >= 3 * num_steps) + (10 * step >= 6 * num_steps)]
                        for step in range(num_steps)]  # fmt: skip


def test_the_policy_keeps_what_the_schedule_says_for_layer_and_step() -> None:
    layout = block_layout(TokenGrid(4, 8, 8), block_size=16)
    inputs = AttentionInputs(*torch.randn(3, 1, layout.num_tokens, 2, 16).unbind(), layout)
    policy = make_policy(DraftConfig(schedule=TWO_RANGES, block_size=16))
    for layer, step, kept in ((0, 0, 8), (1, 2, 8), (0, 3, 2), (1, 9, 12)):
        assert policy(inputs, CallContext(layer, step, 10)).kv_num_blocks.unique().tolist() == [kept]


def test_a_file_gives_the_schedule_back_and_a_config_takes_its_path(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    TWO_RANGES.save(path, {"model": "tiny"})
    assert SparsitySchedule.load(path) == TWO_RANGES
    assert DraftConfig(schedule=path).schedule == DraftConfig(schedule=str(path)).schedule == TWO_RANGES
    assert json.loads(path.read_text())["made"] == {"model": "tiny"}
    assert "\n    [0.9, 0.25]\n" in path.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["schedule.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0.5, 0.4, 1.0), (0.1, 0.2, 0.3)), "must ascend"),
        (((0.5, 0.9), (0.1, 0.2)), "ascend from above 0 to 1.0"),
        (((0.0, 1.0), (0.1, 0.2)), "must ascend"),
        (((1.0,), (1.0,)), "in \\[0, 1\\)"),
        (((1.0,), ((0.5, -0.1),)), "in \\[0, 1\\)"),
        (((1.0,), ((),)), "must be a list of numbers"),
        (((0.5, 1.0), ((0.1, 0.2), (0.1,))), "same layers"),
        (((0.5, 1.0), (0.1,)), "one entry for each of the 2 ranges"),
        ((("half", 1.0), (0.1, 0.2)), "must hold numbers"),
    ],
)
def test_refusals(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SparsitySchedule(*arguments)


def test_a_layer_it_does_not_name_and_an_unknown_step_are_refused() -> None:
    with pytest.raises(InputError, match="names 2 attention layers; the model has a layer 2"):
        TWO_RANGES.at(2, 9, 10)
    with pytest.raises(InputError, match="step is not known"):
        TWO_RANGES.at(0, None, None)
    assert SparsitySchedule((1.0,), (0.4,)).at(7, None, None) == 0.4


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "other"}', '{"format": "draftattn sparsity schedule, version 1"}']
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(text)
    with pytest.raises(InputError, match="schedule"):
        DraftConfig(schedule=path)
    with pytest.raises(InputError, match="cannot be read"):
        SparsitySchedule.load(tmp_path / "none.json")


class TestGrowing:
    @pytest.mark.parametrize("growth", [0.0, 0.3, 0.6, 2.0])
    @pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.95])
    @pytest.mark.parametrize(("first", "steps"), [(0, 1), (0, 20), (13, 50), (19, 20)])
    def test_its_mean_is_the_sparsity_and_it_never_falls(
        self, growth: float, sparsity: float, first: int, steps: int
    ) -> None:
        found = growing_sparsity(sparsity, growth, first, steps)
        assert len(found) == steps - first
        assert sum(found) / len(found) == pytest.approx(sparsity, abs=1e-12)
        assert all(0 <= x < 1 for x in found)
        assert all(second >= early - 1e-12 for early, second in pairwise(found))

    def test_densities_follow_the_power_where_none_is_dense(self) -> None:
        found = growing_sparsity(0.9, 0.5, 4, 16)
        assert (1 - found[0]) / (1 - found[-1]) == pytest.approx((15.5 / 4.5) ** 0.5)
        assert growing_sparsity(0.6, 2, 0, 20)[0] == 0

    def test_a_config_grows_only_where_the_step_is_known(self) -> None:
        config = DraftConfig(sparsity=0.8, warmup=2, growth=1)
        found = [config.sparsity_at(0, step, 10) for step in range(2, 10)]
        assert found == list(growing_sparsity(0.8, 1, 2, 10))
        assert config.sparsity_at(3, None, None) == 0.8
        assert config.sparsity_at(0, 1, 10) == 0.8
        assert DraftConfig(sparsity=0.8, growth=0).sparsity_at(0, 19, 20) == pytest.approx(0.8)
        with pytest.raises(InputError, match=r"growth is 2.5; it must be in \[0, 2\]"):
            DraftConfig(growth=2.5)


class TestGrowingByLayer:
    LAYERS = (0.5, 2.0, 1.0)

    @pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.97])
    @pytest.mark.parametrize(("first", "steps"), [(0, 1), (0, 20), (13, 50), (19, 20)])
    def test_its_mean_is_the_sparsity_and_heavier_layers_are_denser(
        self, sparsity: float, first: int, steps: int
    ) -> None:
        schedule = growing_schedule(sparsity, 0.6, first, steps, self.LAYERS)
        assert schedule.mean(steps, first) == pytest.approx(sparsity, abs=1e-4)
        for step in range(steps):
            light, heavy, middle = (schedule.at(layer, step, steps) for layer in range(3))
            assert heavy <= middle <= light

    def test_densities_are_proportional_to_weights_of_layers_and_steps_up_to_dense(self) -> None:
        schedule = growing_schedule(0.9, 0.5, 4, 16, self.LAYERS)
        first, last = ([1 - schedule.at(layer, step, 16) for layer in range(3)] for step in (4, 15))
        assert first[1] / first[0] == pytest.approx(4, rel=0.01)
        assert first[1] / last[1] == pytest.approx((15.5 / 4.5) ** 0.5, rel=0.01)
        # what a dense layer cannot take, the others share in proportion
        dense, *others = growing_schedule(0.5, 0, 0, 1, (9.0, 2.0, 1.0)).sparsity[0]  # type: ignore[misc]
        assert dense == 0
        assert [1 - share for share in others] == pytest.approx([1 / 3, 1 / 6], abs=1e-4)

    def test_without_weights_it_is_the_rule_for_steps(self) -> None:
        schedule = growing_schedule(0.8, 0.6, 3, 10)
        assert schedule.num_layers is None
        found = [schedule.at(7, step, 10) for step in range(3, 10)]
        assert found == pytest.approx(growing_sparsity(0.8, 0.6, 3, 10), abs=1e-4)
        assert schedule.at(0, 0, 10) == found[0]
