"""Sensitivity of layers, the search for a budget, and the choice between schedules."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from draftattn import DraftConfig, InputError
from draftattn.eval import calibrate as calibration
from draftattn.eval.calibrate import Target, Trial, calibrate, search_density
from draftattn.eval.generation import Generation
from draftattn.eval.sensitivity import Sensitivity, layer_weights, measure_sensitivity
from draftattn.pipelines.video import enable
from draftattn.policies.sparge import SpargeConfig
from draftattn.schedule import SparsitySchedule

CONFIG = DraftConfig(tile="frame", warmup=1, block_size=16)


def run_arguments(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a dog", "seed": 0, "height": 16, "width": 32, "num_frames": 9, "guidance_scale": 1.0} | changes


@pytest.fixture(scope="module")
def pipe(tiny: ModuleType) -> Any:
    return tiny.wan_pipeline()


def outputs(pipe: Any, config: DraftConfig | None, guidance: float, num_steps: int) -> list[torch.Tensor]:
    """What the transformer puts out, call by call."""
    found: list[torch.Tensor] = []
    run = run_arguments(guidance_scale=guidance)
    generator = torch.Generator().manual_seed(run.pop("seed"))
    if config is not None:
        enable(pipe, config)
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: found.append(output[0]))
    try:
        pipe(**run, num_inference_steps=num_steps, generator=generator, output_type="latent")
    finally:
        handle.remove()
        if config is not None:
            pipe.draft.disable()
    return found


class TestSensitivity:
    @pytest.mark.parametrize("guidance", [1.0, 5.0])
    def test_errors_are_those_of_the_output_with_one_layer_sparse(self, pipe: Any, guidance: float) -> None:
        branches = 1 if guidance == 1 else 2
        found = measure_sensitivity(
            pipe, replace(CONFIG, growth=2), [run_arguments(guidance_scale=guidance)], num_steps=3, level=0.5
        )
        layers = len(pipe.transformer.blocks)
        assert (len(found.errors), found.steps) == (layers, (1,))
        dense = outputs(pipe, None, guidance, 3)[branches : 2 * branches]
        for layer in range(layers):
            alone = SparsitySchedule((1.0,), (tuple(0.5 * (other == layer) for other in range(layers)),))
            sparse = outputs(pipe, replace(CONFIG, schedule=alone), guidance, 3)[branches : 2 * branches]
            errors = [float((s - d).square().sum() / d.square().sum()) for s, d in zip(sparse, dense, strict=True)]
            assert found.errors[layer] == pytest.approx(sum(errors) / len(errors), rel=1e-3)
            assert sum(errors) > 0

    def test_a_run_ends_after_the_last_step_measured_and_the_model_is_as_before(self, pipe: Any) -> None:
        calls = []
        handle = pipe.transformer.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        forward = dict(pipe.transformer.__dict__).get("forward")
        layers = len(pipe.transformer.blocks)
        try:
            found = measure_sensitivity(pipe, CONFIG, [run_arguments()] * 2, num_steps=7, measured_steps=2)
        finally:
            handle.remove()
        assert found.steps == (1, 4)
        assert len(calls) == 2 * (5 + 2 * layers)
        assert pipe.transformer.__dict__.get("forward") is forward
        assert not hasattr(pipe, "draft")
        assert len(outputs(pipe, None, 1.0, 7)) == 7

    def test_dense_layers_are_left_out(self, pipe: Any) -> None:
        found = measure_sensitivity(pipe, replace(CONFIG, dense_layers=(0,)), [run_arguments()], num_steps=2)
        assert found.errors[0] is None
        assert all(error is not None and error > 0 for error in found.errors[1:])

    def test_layers_of_two_transformers_share_figures(self, tiny: ModuleType) -> None:
        pipe = tiny.wan_pipeline(
            tiny.wan_transformer(), tiny.wan_transformer(seed=1, num_layers=2), boundary_ratio=0.88
        )
        alone = [measure_sensitivity(pipe, CONFIG, [run_arguments()], num_steps=4, measured_steps=n) for n in (1, 3)]
        assert [len(found.errors) for found in alone] == [3, 3]
        assert alone[0].errors[2] == alone[1].errors[2]  # measured in the first transformer alone
        assert alone[0].errors[1] != alone[1].errors[1]

    def test_models_with_text_among_their_tokens(self, tiny: ModuleType) -> None:
        run = run_arguments(prompt_template=tiny.HUNYUAN_TEMPLATE, max_sequence_length=12)
        found = measure_sensitivity(tiny.hunyuan_pipeline(), CONFIG, [run], num_steps=2)
        assert all(error is not None and error > 0 for error in found.errors)

    def test_more_steps_than_can_be_sparse_are_refused(self, pipe: Any) -> None:
        with pytest.raises(InputError, match="measured_steps is 7; the run has 6 steps after its warm-up"):
            measure_sensitivity(pipe, CONFIG, [run_arguments()], num_steps=7, measured_steps=7)


class TestWeights:
    def test_they_minimise_errors_that_fall_like_one_over_density(self) -> None:
        errors = (0.3, 0.02, 0.1, 0.05)
        best = layer_weights(Sensitivity(errors, 0.9, (0,)))
        assert sum(best) == pytest.approx(4)
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            other = [weight * math.exp(x) for weight, x in zip(best, torch.randn(4, generator=generator), strict=True)]
            densities = [weight * 4 / sum(other) for weight in other]
            assert sum(e / d for e, d in zip(errors, densities, strict=True)) >= sum(
                e / d for e, d in zip(errors, best, strict=True)
            )

    def test_none_is_zero_whatever_was_seen(self) -> None:
        assert layer_weights(Sensitivity((0.0, 0.0, None), 0.9, (0,))) == (1, 1, 1)
        small, *_ = layer_weights(Sensitivity((0.0, 1.0, 1.0, 1.0), 0.9, (0,)))
        assert 0.2 < small < 0.25


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


class TestChoice:
    """Which schedule is written, with videos whose errors are known."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[DraftConfig | None]:
        sensitivity = Sensitivity((0.09, 0.01), 0.9, (1,))
        monkeypatch.setattr(calibration, "measure_sensitivity", lambda *_, **__: sensitivity)
        asked: list[DraftConfig | None] = []
        self.penalty = 0.0

        def generate(pipe: Any, config: DraftConfig | None, run: Any, num_steps: int) -> Generation:
            asked.append(config)
            density, error = 1.0, 0.0
            if config is not None:
                assert isinstance(config.schedule, SparsitySchedule)
                density = 1 - config.schedule.mean(num_steps, 1)
                error = 0.02 / density + (self.penalty if config.schedule.num_layers else 0)
            video = torch.full((2, 3, 8, 8), 0.5 + error)
            return Generation(video, 2.0, (1.0, *[density] * (num_steps - 1)), 0.0)

        monkeypatch.setattr(calibration, "_generate", generate)
        return asked

    @staticmethod
    def calibrated(target: str, **changes: Any) -> calibration.Calibration:
        pipe = type("Pipe", (), {"_execution_device": "cpu"})()
        return calibrate(pipe, replace(CONFIG, **changes), Target.read(target), [run_arguments()], num_steps=11)

    @pytest.mark.parametrize("target", ["speed 2x", "psnr 20", "sparsity 0.8"])
    @pytest.mark.parametrize("penalty", [-0.01, 0.01])
    def test_the_better_of_two_at_the_same_density(
        self, asked: list[DraftConfig | None], target: str, penalty: float
    ) -> None:
        self.penalty = penalty
        found = self.calibrated(target)
        last, alike = found.trials[-2:] if target.startswith("sparsity") else (found.chosen, found.trials[-1])
        assert not alike.by_layer
        assert alike.density == pytest.approx(found.chosen.density)
        assert found.chosen.by_layer == (penalty < 0)
        assert found.chosen.psnr == max(last.psnr, alike.psnr)
        assert found.schedule.num_layers == (2 if penalty < 0 else None)
        assert 1 - found.schedule.mean(11, 1) == pytest.approx(found.chosen.density, abs=1e-4)
        assert Target.read(target).is_met(found.chosen)
        assert json.loads(json.dumps(found.to_json(), allow_nan=False))["chosen"]["by_layer"] == (penalty < 0)

    def test_layers_and_steps_share_by_their_weights(self, asked: list[DraftConfig | None]) -> None:
        self.penalty = -0.01
        schedule = self.calibrated("sparsity 0.8", growth=1).schedule
        for step in (1, 10):
            heavy, light = (1 - schedule.at(layer, step, 11) for layer in (0, 1))
            assert heavy / light == pytest.approx(3, rel=0.01)
        assert (1 - schedule.at(1, 3, 11)) / (1 - schedule.at(1, 10, 11)) == pytest.approx(3, rel=0.01)

    def test_what_takes_no_schedule_is_refused_before_anything_runs(self, asked: list[DraftConfig | None]) -> None:
        for policy in ("xattention", SpargeConfig(mass=0.8)):
            with pytest.raises(InputError, match="with a schedule"):
                self.calibrated("sparsity 0.8", policy=policy)
        with pytest.raises(InputError, match="none of the 11 steps is left"):
            self.calibrated("sparsity 0.8", warmup=11)
        assert not asked


def test_a_psnr_is_reached_by_the_schedule_found(pipe: Any) -> None:
    phases: list[str] = []
    found = calibrate(pipe, CONFIG, Target("psnr", 20.0), [run_arguments()], num_steps=4, on_phase=phases.append)
    assert found.chosen.psnr >= 20
    assert len(phases) == 2 + len(found.trials)
    assert found.schedule.num_layers == (len(pipe.transformer.blocks) if found.chosen.by_layer else None)
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
    arguments = ["--model", tmp_path / "model", "--prompt", "a dog", "--height", 128, "--width", 128, "--frames", 9]
    arguments += ["--steps", 4, "--measured-steps", 2, "--guidance", 1, "--warmup", 1, "--target", "sparsity 0.7"]
    result = CliRunner().invoke(app, ["calibrate", *map(str, arguments), "--output", str(output)])
    assert result.exit_code == 0, result.output
    schedule = DraftConfig(schedule=output).schedule
    assert isinstance(schedule, SparsitySchedule)
    assert schedule.mean(4, 1) == pytest.approx(0.7, abs=1e-3)
    made = json.loads(output.read_text())["made"]
    assert made["target"] == "sparsity 0.7"
    assert [trial["by_layer"] for trial in made["trials"]] == [True, False]
    assert made["chosen"]["psnr"] == max(trial["psnr"] for trial in made["trials"])
    assert "mean 0.7" in result.output
    assert "layers alike" in result.output
