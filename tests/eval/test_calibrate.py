"""Sensitivity, allocation and the search for a budget."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from draftattn import DraftConfig, InputError, TokenGrid, block_layout
from draftattn.attention import attend
from draftattn.eval import calibrate as calibration
from draftattn.eval.calibrate import Target, Trial, calibrate, search_density
from draftattn.eval.sensitivity import Sensitivity, SensitivityProbe, allocate, measure_sensitivity
from draftattn.inputs import AttentionInputs
from draftattn.policies import make_policy
from draftattn.policy import CallContext

CONFIG = DraftConfig(tile="frame", warmup=1, block_size=16)
LEVELS = (0.5, 0.9)


def run_arguments(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a dog", "seed": 0, "height": 16, "width": 32, "num_frames": 9, "guidance_scale": 1.0} | changes


@pytest.fixture(scope="module")
def pipe(tiny: ModuleType) -> Any:
    return tiny.wan_pipeline()


def test_errors_are_those_of_the_attention_outputs() -> None:
    layout = block_layout(TokenGrid(4, 8, 8), block_size=16)
    inputs = AttentionInputs(*torch.randn(3, 1, layout.num_tokens, 2, 16).unbind(), layout)
    probe = SensitivityProbe(CONFIG, LEVELS, {3: 0, 5: 1})
    for step in range(8):
        mask = probe(inputs, CallContext(layer=2, step=step, num_steps=8))
        assert mask.block_map.all()
    assert set(probe.seen) == {(0, 2), (1, 2)}
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    ).transpose(1, 2)
    for level, error in zip(LEVELS, probe.seen[0, 2][0], strict=True):
        config = DraftConfig(sparsity=level, block_size=16)
        sparse = attend(inputs, make_policy(config)(inputs, CallContext()), config)
        assert error == pytest.approx(float((sparse - exact).square().sum() / exact.square().sum()), rel=1e-3)


def test_every_layer_is_measured_in_every_range(pipe: Any) -> None:
    steps = []
    found = measure_sensitivity(
        pipe, CONFIG, [run_arguments()], num_steps=7, num_ranges=2, levels=LEVELS, on_step=lambda: steps.append(1)
    )
    assert len(steps) == 7
    assert found.steps == (4 / 7, 1.0)
    assert found.first == 1 / 7
    layers = len(pipe.transformer.blocks)
    assert [len(rows) for rows in found.errors] == [layers, layers]
    for low, high in itertools.chain(*found.errors):
        assert 0 < low < high
    with pytest.raises(InputError, match="6 steps after its warm-up"):
        measure_sensitivity(pipe, CONFIG, [run_arguments()], num_steps=7, num_ranges=7)


def density_of(schedule: Any, sensitivity: Sensitivity) -> float:
    starts = (sensitivity.first, *sensitivity.steps[:-1])
    return sum(
        (end - start) * (1 - sum(row) / len(row))
        for start, end, row in zip(starts, sensitivity.steps, schedule.sparsity, strict=True)
    ) / (1 - sensitivity.first)


class TestAllocate:
    @pytest.mark.parametrize("density", [0.1, 0.2, 0.35, 0.6, 1.0])
    def test_the_budget_is_kept_and_used(self, density: float) -> None:
        generator = torch.Generator().manual_seed(0)
        levels = (0.5, 0.7, 0.8, 0.9)
        errors = torch.rand(3, 5, 4, generator=generator).sort(-1).values
        sensitivity = Sensitivity(
            (0.4, 0.7, 1.0), levels, tuple(tuple(map(tuple, rows)) for rows in errors.tolist()), 0.1
        )
        used = density_of(allocate(sensitivity, density), sensitivity)
        # what is left is smaller than the smallest step of the cheapest range
        assert density - 0.1 * (0.3 / 0.9) / 5 - 1e-9 <= used <= density + 1e-9

    def test_it_finds_the_best_of_all_allocations_where_errors_are_convex(self) -> None:
        levels = (0.5, 0.75)  # dense, a half, a quarter: even costs
        errors = (((0.1, 0.9), (0.3, 0.7), (0.05, 0.2)),)
        sensitivity = Sensitivity((1.0,), levels, errors)
        for density in (0.25, 1 / 3, 0.5):
            (row,) = allocate(sensitivity, density).sparsity
            assert isinstance(row, tuple)
            error_of = [{0.0: 0.0, **dict(zip(levels, of_layer, strict=True))} for of_layer in errors[0]]
            best = min(
                sum(error[level] for error, level in zip(error_of, choice, strict=True))
                for choice in itertools.product((0.0, *levels), repeat=3)
                if sum(1 - level for level in choice) <= 3 * density + 1e-9
            )
            assert sum(error[level] for error, level in zip(error_of, row, strict=True)) == pytest.approx(best)

    def test_a_budget_below_the_highest_sparsity_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"0\.05 is below 0\.1"):
            allocate(Sensitivity((1.0,), (0.9,), (((0.5,),),)), 0.05)


class TestSearch:
    @staticmethod
    def attempt(density: float) -> Trial:
        return Trial(density, speed=1 / (0.3 + 0.7 * density), psnr=20 + 10 * math.log10(density) + 10)

    @pytest.mark.parametrize(("target", "exact"), [("speed 2x", 2 / 7), ("psnr 24", 10**-0.6)])
    def test_the_density_is_close_to_the_exact_one_and_on_the_right_side(self, target: str, exact: float) -> None:
        aim = Target.read(target)
        found = search_density(self.attempt, aim, least=0.05)
        assert aim.is_met(found)
        assert found.density == pytest.approx(exact, rel=0.25)

    @pytest.mark.parametrize("target", ["speed 3.2x", "psnr 29.9"])
    def test_what_no_density_reaches_is_refused(self, target: str) -> None:
        with pytest.raises(InputError, match="out of reach"):
            search_density(self.attempt, Target.read(target), least=0.05)


@pytest.mark.parametrize("text", ["", "speed", "speed 1x", "speed 0.5", "psnr -3", "lpips 0.1", "sparsity 1", "2x"])
def test_targets_that_say_nothing_useful_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="target is"):
        Target.read(text)


def test_a_psnr_is_reached_by_the_schedule_found(pipe: Any) -> None:
    phases: list[str] = []
    found = calibrate(
        pipe, CONFIG, Target("psnr", 20.0), [run_arguments()], num_steps=4, num_ranges=2, levels=LEVELS,
        on_phase=phases.append,
    )  # fmt: skip
    assert found.chosen is not None
    assert found.chosen.psnr >= 20
    assert len(phases) == 2 + len(found.trials)
    assert found.schedule.num_layers == len(pipe.transformer.blocks)
    made = [
        calibration._generate(pipe, config, run_arguments(), 4)
        for config in (None, replace(CONFIG, schedule=found.schedule))
    ]
    again = calibration.psnr(*(calibration.to_bytes(generation.video) for generation in made))
    assert float(again.mean()) == pytest.approx(found.chosen.psnr, abs=0.01)


def test_the_command_writes_a_file_that_a_config_takes(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from draftattn.cli.app import app

    pipe.save_pretrained(tmp_path / "model")
    output = tmp_path / "schedule.json"
    arguments = ["--model", tmp_path / "model", "--prompt", "a dog", "--height", 16, "--width", 32, "--frames", 9]
    arguments += ["--steps", 4, "--ranges", 2, "--guidance", 1, "--warmup", 1, "--target", "sparsity 0.7"]
    result = CliRunner().invoke(app, ["calibrate", *map(str, arguments), "--output", str(output)])
    assert result.exit_code == 0, result.output
    schedule = DraftConfig(schedule=output).schedule
    assert schedule.num_layers == len(pipe.transformer.blocks)  # type: ignore[union-attr]
    assert json.loads(output.read_text())["made"]["target"] == "sparsity 0.7"
    assert "mean 0.7" in result.output
