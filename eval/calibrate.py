"""Finding the sparsity of every layer and range of steps that meets a target of speed or of quality."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.eval.frames import to_bytes
from draftattn.eval.generation import Generation, generate
from draftattn.eval.metrics.psnr import psnr
from draftattn.eval.sensitivity import LEVELS, Sensitivity, allocate, measure_sensitivity
from draftattn.pipelines.video import enable
from draftattn.schedule import SparsitySchedule

_MOST_TRIALS = 5


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
        """Whether a trial reaches it."""
        return (trial.speed if self.kind == "speed" else trial.psnr) >= self.value


@dataclass(frozen=True)
class Trial:
    """What runs with one budget were like, means over the runs.

    Args:
        density: mean share of block pairs kept after the warm-up.
        speed: denoising seconds of dense runs over those of these, by their steps.
        psnr: dB of the decoded video against the dense one.
    """

    density: float
    speed: float
    psnr: float


@dataclass(frozen=True)
class Calibration:
    """The schedule found, and how.

    Args:
        schedule: sparsity by layer and step.
        sensitivity: what it was allocated by.
        trials: the runs that decided its budget, in order; none where the target is a sparsity.
        chosen: the trial that the schedule is from.
    """

    schedule: SparsitySchedule
    sensitivity: Sensitivity
    trials: tuple[Trial, ...]
    chosen: Trial | None

    def to_json(self) -> dict[str, Any]:
        """What a schedule's file says of how it came about."""
        return {
            "trials": [asdict(trial) for trial in self.trials],
            "chosen": None if self.chosen is None else asdict(self.chosen),
            "sensitivity": asdict(self.sensitivity),
        }


def calibrate(
    pipe: Any,
    config: DraftConfig,
    target: Target,
    runs: Sequence[Mapping[str, Any]],
    *,
    num_steps: int,
    num_ranges: int = 3,
    levels: Sequence[float] = LEVELS,
    on_phase: Callable[[str], None] = lambda what: None,
) -> Calibration:
    """Measures how sensitive layers are, shares budgets by it, and finds the budget that meets a target.

    One dense run for each prompt measures every layer at every level of sparsity (`measure_sensitivity`), `allocate`
    turns any mean density into a schedule, and a few whole generations find the density: the largest that is still
    fast enough, or the smallest that is good enough.

    Args:
        pipe: a pipeline that draft attention supports.
        config: the other settings: warm-up, tile, residual, dense layers.
        target: what to reach.
        runs: arguments of the pipeline's call for each run, ``seed`` among them.
        num_steps: denoising steps of a run.
        num_ranges: ranges of steps that get a sparsity of their own.
        levels: sparsities to choose from; dense is always one more.
        on_phase: told what is being done.

    Raises:
        InputError: if no schedule meets the target; says what the nearest one reaches.
    """
    if config.policy != "draft":
        raise InputError(f"policy is {config.policy!r}; a schedule is for the policy 'draft'")
    on_phase("measuring how sensitive layers are")
    sensitivity = measure_sensitivity(pipe, config, runs, num_steps=num_steps, num_ranges=num_ranges, levels=levels)
    if target.kind == "sparsity":
        return Calibration(allocate(sensitivity, 1 - target.value), sensitivity, (), None)

    on_phase("making the dense videos")
    dense = [_generate(pipe, None, run, num_steps) for run in runs]
    trials: list[Trial] = []

    def attempt(density: float) -> Trial:
        on_phase(f"making videos at density {density:.3f}")
        scheduled = replace(config, schedule=allocate(sensitivity, density))
        if not trials and torch.device(pipe._execution_device).type == "cuda":
            _generate(pipe, scheduled, runs[0], num_steps)  # compiles kernels
        made = [_generate(pipe, scheduled, run, num_steps) for run in runs]
        ratios = [_denoising_seconds(d) / _denoising_seconds(s) for d, s in zip(dense, made, strict=True)]
        scores = [float(psnr(to_bytes(s.video), to_bytes(d.video)).mean()) for d, s in zip(dense, made, strict=True)]
        trials.append(Trial(density, sum(ratios) / len(ratios), sum(scores) / len(scores)))
        return trials[-1]

    chosen = search_density(attempt, target, least=1 - levels[-1])
    return Calibration(allocate(sensitivity, chosen.density), sensitivity, tuple(trials), chosen)


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


def _generate(pipe: Any, config: DraftConfig | None, run: Mapping[str, Any], num_steps: int) -> Generation:
    if config is None:
        return generate(pipe, **run, num_inference_steps=num_steps)
    with enable(pipe, config):
        return generate(pipe, **run, num_inference_steps=num_steps)


def _denoising_seconds(generation: Generation) -> float:
    return sum(generation.step_seconds)
