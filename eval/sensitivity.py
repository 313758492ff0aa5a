"""How much error every layer makes at every sparsity, early and late in a run, and how a budget is shared by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from draftattn.attention import attend
from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.pipelines.video import enable
from draftattn.policies import make_policy
from draftattn.policy import CallContext
from draftattn.schedule import SparsitySchedule

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Sensitivity:
    """Squared relative error of attention outputs.

    Args:
        steps: where each range of steps ends, as shares of a run.
        levels: sparsities, ascending.
        errors: for each range, layer and level the mean of ``|sparse - dense|² / |dense|²`` over the calls seen.
        first: where the first range begins, as a share of a run: the steps before it are dense.
    """

    steps: tuple[float, ...]
    levels: tuple[float, ...]
    errors: tuple[tuple[tuple[float, ...], ...], ...]
    first: float = 0.0

    @property
    def num_layers(self) -> int:
        """Layers measured."""
        return len(self.errors[0])


@dataclass
class SensitivityProbe:
    """A mask policy that keeps a run dense and measures what sparsity would do to its attention outputs.

    Args:
        config: the settings to measure, but for the sparsity.
        levels: sparsities to measure.
        at_steps: the denoising steps to look at, and the range each stands for.
    """

    config: DraftConfig
    levels: Sequence[float]
    at_steps: Mapping[int, int]
    seen: dict[tuple[int, int], list[tuple[float, ...]]] = field(default_factory=dict)

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `MaskPolicy`."""
        dense = self._mask(0.0, inputs, context, scale)
        i_range = None if context.step is None else self.at_steps.get(context.step)
        if i_range is not None:
            video = inputs.layout.grid.num_tokens
            exact = attend(inputs, dense, replace(self.config, residual=False), scale=scale)[:, :video].float()
            errors = []
            for level in self.levels:
                mask = self._mask(level, inputs, context, scale)
                output = attend(inputs, mask, self.config, scale=scale)[:, :video].float()
                errors.append((output - exact).square().sum() / exact.square().sum())
            self.seen.setdefault((i_range, context.layer), []).append(tuple(torch.stack(errors).tolist()))
        return dense

    def _mask(self, level: float, inputs: AttentionInputs, context: CallContext, scale: float | None) -> BlockMask:
        return make_policy(replace(self.config, sparsity=level, schedule=None))(inputs, context, scale)


def measure_sensitivity(
    pipe: Any,
    config: DraftConfig,
    runs: Iterable[Mapping[str, Any]],
    *,
    num_steps: int,
    num_ranges: int = 3,
    levels: Sequence[float] = LEVELS,
    on_step: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Runs a pipeline densely and measures every layer in the middle of every range of steps.

    Args:
        pipe: a pipeline that draft attention supports.
        config: the settings to measure, but for the sparsity. The ranges are equal parts of the steps after its
            warm-up.
        runs: arguments of the pipeline's call for each run, ``seed`` among them.
        num_steps: denoising steps of a run.
        num_ranges: ranges of steps.
        levels: sparsities to measure, ascending.
        on_step: called after every denoising step.

    Raises:
        InputError: if there are more ranges than steps after the warm-up.
    """
    first = config.num_warmup_steps(num_steps)
    if not 1 <= num_ranges <= num_steps - first:
        raise InputError(f"ranges is {num_ranges}; the run has {num_steps - first} steps after its warm-up")
    bounds = [first + i * (num_steps - first) // num_ranges for i in range(num_ranges + 1)]
    middle = {(start + end) // 2: i for i, (start, end) in enumerate(pairwise(bounds))}
    probe = SensitivityProbe(config, levels, middle)

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del pipe, step, timestep
        on_step()
        return tensors

    with enable(pipe, replace(config, warmup=0, schedule=None), policy=probe):
        for run in runs:
            arguments = {name: value for name, value in run.items() if name != "seed"}
            pipe(
                **arguments,
                num_inference_steps=num_steps,
                generator=torch.Generator().manual_seed(run["seed"]),
                output_type="latent",
                callback_on_step_end=after_step,
            )
    num_layers = 1 + max(layer for _, layer in probe.seen)
    errors = tuple(
        tuple(_mean_rows(probe.seen.get((i, layer)), len(levels)) for layer in range(num_layers))
        for i in range(num_ranges)
    )
    ends = (*(bound / num_steps for bound in bounds[1:-1]), 1.0)
    return Sensitivity(ends, tuple(levels), errors, first / num_steps)


def allocate(sensitivity: Sensitivity, density: float) -> SparsitySchedule:
    """Shares a mean density among layers and ranges so that the sum of squared errors is small.

    Greedy: every layer in every range begins at the highest sparsity measured, and the step down to a lower one, to
    dense at the end, that takes away the most error for what it costs is made as long as the budget lasts.

    Args:
        sensitivity: from `measure_sensitivity`.
        density: mean share of block pairs kept in the steps after the warm-up, in (0, 1].

    Raises:
        InputError: if the highest sparsity measured already costs more.

    >>> flat, steep = (0.01, 0.02), (0.2, 0.9)
    >>> allocate(Sensitivity((1.0,), (0.5, 0.9), ((flat, steep),)), density=0.3).sparsity
    ((0.9, 0.5),)
    """
    ends = sensitivity.steps
    starts = (sensitivity.first, *ends[:-1])
    levels: tuple[float, ...] = (0.0, *sensitivity.levels)
    # of the steps that can be sparse, and for one layer
    share = [
        (end - start) / (1 - sensitivity.first) / sensitivity.num_layers
        for start, end in zip(starts, ends, strict=True)
    ]
    least = 1 - levels[-1]
    if density < least - 1e-9:
        raise InputError(f"a density of {density:.3g} is below {least:.3g}, that of the highest sparsity measured")
    # a lower sparsity never counts as worse, whatever noise says
    errors: list[list[list[float]]] = []
    for rows in sensitivity.errors:
        errors.append([[0.0] for _ in rows])
        for row, kept in zip(rows, errors[-1], strict=True):
            for error in row:
                kept.append(max(kept[-1], error))
    chosen: list[list[int]] = [[len(levels) - 1] * sensitivity.num_layers for _ in ends]
    left = density - least
    while True:
        best: tuple[float, float, int, int, int] | None = None
        for i, of_range in enumerate(chosen):
            for layer, now in enumerate(of_range):
                for lower in range(now):
                    cost = (levels[now] - levels[lower]) * share[i]
                    gain = (errors[i][layer][now] - errors[i][layer][lower]) * share[i]
                    if cost <= left + 1e-12 and (best is None or (gain / cost, cost) > best[:2]):
                        best = gain / cost, cost, i, layer, lower
        if best is None:
            break
        left -= best[1]
        chosen[best[2]][best[3]] = best[4]
    return SparsitySchedule(ends, tuple(tuple(levels[level] for level in of_range) for of_range in chosen))


def _mean_rows(rows: list[tuple[float, ...]] | None, count: int) -> tuple[float, ...]:
    if not rows:
        raise InputError("a layer was not reached in every range of steps; calibrate with fewer ranges")
    return tuple(sum(row[i] for row in rows) / len(rows) for i in range(count))
