"""Finding the sparsity of every layer and step that meets a target of speed or of quality."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

import torch

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.eval.frames import to_bytes
from draftattn.eval.generation import Generation, generate
from draftattn.eval.metrics.psnr import psnr
from draftattn.eval.sensitivity import Sensitivity, layer_weights, measure_sensitivity
from draftattn.pipelines.video import enable
from draftattn.schedule import SparsitySchedule, growing_schedule

_MOST_TRIALS = 5
_LEAST_DENSITY = 0.05


@dataclass(frozen=True)
class Target:
    """What a calibration aims at.

    Args:
        kind: ``"speed"``, denoising so many times as fast as dense; ``"psnr"``, at least so many dB against the dense
            video; ``"sparsity"``, this mean sparsity after the warm-up.
        value: the number.
    """

    kind: Literal["speed", "psnr", "sparsity"]
    value: float

    @classmethod
    def read(cls, text: str) -> Target:
        """Reads ``"speed 2x"``, ``"psnr 30"`` or ``"sparsity 0.8"``.

        Raises:
            InputError: if it says something else.

        >>> Target.read("speed 1.5x")
        Target(kind='speed', value=1.5)
        """
        match = re.fullmatch(r"\s*(speed|psnr|sparsity)[\s=]*(\d+(?:\.\d+)?)\s*(x|×|dB)?\s*", text)
        if match is None:
            raise InputError(f"target is {text!r}; give one such as 'speed 2x', 'psnr 30' or 'sparsity 0.8'")
        kind, value = match[1], float(match[2])
        if (kind == "speed" and value <= 1) or (kind == "sparsity" and not 0 <= value < 1) or value < 0:
            allowed = {"speed": "above 1", "sparsity": "in [0, 1)", "psnr": "positive"}[kind]
            raise InputError(f"target is {text!r}; {kind} must be {allowed}")
        return cls(kind, value)  # type: ignore[arg-type]

    def is_met(self, trial: Trial) -> bool:
        """Whether a trial reaches it; a sparsity is reached as soon as it is set."""
        return self.kind == "sparsity" or (trial.speed if self.kind == "speed" else trial.psnr) >= self.value


@dataclass(frozen=True)
class Trial:
    """What runs with one schedule were like, means over the runs.

    Args:
        density: mean share of block pairs kept after the warm-up.
        speed: denoising seconds of dense runs over those of these, by their steps.
        psnr: dB of the decoded video against the dense one.
        by_layer: whether layers had sparsities of their own; otherwise it only grew over the steps.
    """

    density: float
    speed: float
    psnr: float
    by_layer: bool = True


@dataclass(frozen=True)
class Calibration:
    """The schedule found, and how.

    Args:
        schedule: sparsity by layer and step.
        sensitivity: what layers were weighted by.
        trials: the runs made, in order; the last has the density chosen, and layers all alike.
        chosen: the trial that the schedule is from.
    """

    schedule: SparsitySchedule
    sensitivity: Sensitivity
    trials: tuple[Trial, ...]
    chosen: Trial

    def to_json(self) -> dict[str, Any]:
        """What a schedule's file says of how it came about."""
        return {
            "trials": [_trial_to_json(trial) for trial in self.trials],
            "chosen": _trial_to_json(self.chosen),
            "sensitivity": asdict(self.sensitivity),
        }


def calibrate(
    pipe: Any,
    config: DraftConfig,
    target: Target,
    runs: Sequence[Mapping[str, Any]],
    *,
    num_steps: int,
    measured_steps: int = 1,
    on_phase: Callable[[str], None] = lambda what: None,
) -> Calibration:
    """Measures how sensitive layers are, shares budgets by it, and finds the budget that meets a target.

    The densities of steps fall as `DraftConfig.growth` says, and those of layers are shared by what each does to the
    transformer's output (`measure_sensitivity`, `layer_weights`). A few whole generations find the density: the
    largest that is still fast enough, or the smallest that is good enough. At that density videos are also made with
    all layers alike, and the schedule is of the kind that is closer to the dense videos.

    Args:
        pipe: a pipeline that draft attention supports.
        config: the other settings: warm-up, growth, tile, residual, dense layers.
        target: what to reach.
        runs: arguments of the pipeline's call for each run, ``seed`` among them.
        num_steps: denoising steps of a run.
        measured_steps: how many steps the layers are measured at.
        on_phase: told what is being done.

    Raises:
        InputError: if no schedule meets the target; says what the nearest one reaches. If the policy takes none.
    """
    first = config.num_warmup_steps(num_steps)
    if first >= num_steps:
        raise InputError(f"warmup is {config.warmup!r}; none of the {num_steps} steps is left to be sparse")

    def scheduled(density: float, layers: Sequence[float]) -> DraftConfig:
        return replace(config, schedule=growing_schedule(1 - density, config.growth, first, num_steps, layers))

    scheduled(1.0, ())  # a policy that takes no schedule is refused before anything is measured
    on_phase("measuring how sensitive layers are")
    sensitivity = measure_sensitivity(pipe, config, runs, num_steps=num_steps, measured_steps=measured_steps)
    weights = layer_weights(sensitivity)
    on_phase("making the dense videos")
    dense = [_generate(pipe, None, run, num_steps) for run in runs]
    trials: list[Trial] = []

    def attempt(density: float, by_layer: bool = True) -> Trial:
        on_phase(f"making videos at density {density:.3f}" + ("" if by_layer else ", all layers alike"))
        settings = scheduled(density, weights if by_layer else ())
        if not trials and torch.device(pipe._execution_device).type == "cuda":
            _generate(pipe, settings, runs[0], num_steps)  # compiles kernels
        made = [_generate(pipe, settings, run, num_steps) for run in runs]
        ratios = [_denoising_seconds(d) / _denoising_seconds(s) for d, s in zip(dense, made, strict=True)]
        scores = [float(psnr(to_bytes(s.video), to_bytes(d.video)).mean()) for d, s in zip(dense, made, strict=True)]
        trials.append(Trial(density, fmean(ratios), fmean(scores), by_layer))
        return trials[-1]

    if target.kind == "sparsity":
        chosen = attempt(1 - target.value)
    else:
        chosen = search_density(attempt, target, least=_LEAST_DENSITY)
    alike = attempt(chosen.density, by_layer=False)
    if alike.psnr > chosen.psnr and target.is_met(alike):
        chosen = alike
    found = scheduled(chosen.density, weights if chosen.by_layer else ()).schedule
    assert isinstance(found, SparsitySchedule)
    return Calibration(found, sensitivity, tuple(trials), chosen)


def search_density(attempt: Callable[[float], Trial], target: Target, least: float) -> Trial:
    """The trial that meets a target best: bisection over the logarithm of the density, between ``least`` and 1.

    Speed falls with density and PSNR grows. The density asked for first is the most useful end: where even that fails
    the target is out of reach.

    Args:
        attempt: makes a trial.
        target: of speed or PSNR.
        least: the smallest density there is.

    Returns:
        Of the trials that meet the target the densest for a speed, the sparsest for a PSNR.

    Raises:
        InputError: if none meets it.
    """
    wants_dense = target.kind == "psnr"
    low, high = least, 1.0
    trials = [attempt(0.75 if wants_dense else least)]
    if not target.is_met(trials[0]):
        reached = trials[0]
        raise InputError(
            f"target is {target.kind} {target.value:g}, out of reach: at density {reached.density:.3g} speed is "
            f"{reached.speed:.2f} and PSNR {reached.psnr:.1f} dB; try a longer warm-up for quality, a shorter one for "
            "speed"
        )
    if wants_dense:
        high = 0.75
    for _ in range(_MOST_TRIALS - 1):
        density = math.sqrt(low * high)
        trials.append(attempt(density))
        # a larger density is tried where speed is left over or quality lacks
        if target.is_met(trials[-1]) != wants_dense:
            low = density
        else:
            high = density
    met = [trial for trial in trials if target.is_met(trial)]
    return min(met, key=lambda trial: trial.density) if wants_dense else max(met, key=lambda trial: trial.density)


def _trial_to_json(trial: Trial) -> dict[str, Any]:
    return {**asdict(trial), "psnr": trial.psnr if math.isfinite(trial.psnr) else None}


def _generate(pipe: Any, config: DraftConfig | None, run: Mapping[str, Any], num_steps: int) -> Generation:
    if config is None:
        return generate(pipe, **run, num_inference_steps=num_steps)
    with enable(pipe, config):
        return generate(pipe, **run, num_inference_steps=num_steps)


def _denoising_seconds(generation: Generation) -> float:
    return sum(generation.step_seconds)
