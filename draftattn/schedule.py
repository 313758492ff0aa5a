"""Sparsity that changes over the steps of a run and from layer to layer."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

from draftattn.errors import InputError
from draftattn.files import check_writable, written_whole

_FORMAT = "draftattn sparsity schedule, version 1"


@dataclass(frozen=True)
class SparsitySchedule:
    """Sparsity for ranges of denoising steps, the same for all layers or one for each.

    Early steps decide the layout of a scene and late ones its details, and layers differ in how much attention they
    can lose; a schedule spends one budget where it counts. It says nothing of warm-up: a dense step stays dense.

    Args:
        steps: where each range ends, as shares of a run, ascending to 1.0: a step belongs to the first range whose end
            lies above ``step / num_steps``.
        sparsity: for each range a share of video block pairs dropped in [0, 1), or one such share per attention layer.

    Raises:
        InputError: if these do not fit together or are out of range.

    >>> schedule = SparsitySchedule(steps=(0.3, 1.0), sparsity=(0.5, (0.9, 0.8)))
    >>> schedule.at(layer=1, step=0, num_steps=50), schedule.at(layer=1, step=15, num_steps=50)
    (0.5, 0.8)
    """

    steps: tuple[float, ...]
    sparsity: tuple[float | tuple[float, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _as_numbers("steps", self.steps))
        rows = self.sparsity
        if not isinstance(rows, (tuple, list)) or len(rows) != len(self.steps) or not rows:
            raise InputError(f"sparsity is {rows!r}; it must hold one entry for each of the {len(self.steps)} ranges")
        rows = tuple(row if isinstance(row, Real) else _as_numbers("sparsity", row) for row in rows)
        object.__setattr__(self, "sparsity", rows)
        if self.steps[-1] != 1 or self.steps[0] <= 0 or any(first >= second for first, second in pairwise(self.steps)):
            raise InputError(f"steps is {self.steps!r}; it must ascend from above 0 to 1.0")
        for share in (share for row in rows for share in (row if isinstance(row, tuple) else (row,))):
            if not 0 <= share < 1:
                raise InputError(f"sparsity holds {share!r}; it must be in [0, 1): the share of blocks dropped")
        if len({len(row) for row in rows if isinstance(row, tuple)}) > 1 or () in rows:
            raise InputError(f"sparsity is {rows!r}; ranges with a share per layer must name the same layers")

    def __str__(self) -> str:
        """A short name, fit for a file: the mean sparsity and a digest of the rest."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        return f"{self.mean():.4g}of{digest}"

    @property
    def num_layers(self) -> int | None:
        """Layers it names, or None where it holds for any number of them."""
        return next((len(row) for row in self.sparsity if isinstance(row, tuple)), None)

    def at(self, layer: int, step: int | None, num_steps: int | None) -> float:
        """Sparsity of one layer at one step.

        Raises:
            InputError: if the layer is not named, or the step is not known though it matters.
        """
        if step is None or num_steps is None:
            if len(self.steps) > 1:
                raise InputError("the schedule changes over the steps, but the denoising step is not known")
            step, num_steps = 0, 1
        # a hair's breadth decides against the rounding of shares such as 0.3
        position = step / num_steps + 1e-9
        row = next(row for end, row in zip(self.steps, self.sparsity, strict=True) if position < end or end == 1)
        if not isinstance(row, tuple):
            return row
        if not 0 <= layer < len(row):
            raise InputError(f"the schedule names {len(row)} attention layers; the model has a layer {layer}")
        return row[layer]

    def mean(self, num_steps: int = 1000, first_step: int = 0) -> float:
        """Mean sparsity over layers and the steps of a run from ``first_step`` on.

        >>> schedule = SparsitySchedule(steps=(0.5, 1.0), sparsity=(0.5, (0.9, 0.8)))
        >>> schedule.mean(), schedule.mean(num_steps=10, first_step=5)
        (0.675, 0.85)
        """
        layers, steps = range(self.num_layers or 1), range(first_step, num_steps)
        total = sum(self.at(layer, step, num_steps) for layer in layers for step in steps)
        return round(total / (len(layers) * len(steps)), 9)

    def save(self, path: str | Path, made: dict[str, Any] | None = None) -> None:
        """Writes a JSON file, whole or not at all.

        Args:
            path: the file.
            made: how the schedule came about, kept beside it; anything JSON can hold.
        """
        check_writable(Path(path))
        rows = ",\n    ".join(json.dumps(row) for row in self.sparsity)
        origin = json.dumps(made or {}, indent=2, allow_nan=False, ensure_ascii=False).replace("\n", "\n  ")
        # a line for each range
        lines = (
            f'"format": {json.dumps(_FORMAT)}',
            f'"steps": {json.dumps(self.steps)}',
            f'"sparsity": [\n    {rows}\n  ]',
            f'"made": {origin}',
        )
        with written_whole(Path(path)) as temporary:
            temporary.write_text("{\n  " + ",\n  ".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SparsitySchedule:
        """Reads the file of `save`.

        Raises:
            InputError: if it cannot be read or holds no schedule.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"schedule {str(path)!r} cannot be read: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InputError(f"schedule {str(path)!r} is not a file of 'draftattn calibrate' ({_FORMAT})")
        rows = content.get("sparsity")
        if not isinstance(rows, list):
            raise InputError(f"schedule {str(path)!r} has no sparsity")
        return cls(content.get("steps", ()), tuple(tuple(row) if isinstance(row, list) else row for row in rows))


@functools.lru_cache(maxsize=256)
def growing_sparsity(sparsity: float, growth: float, first_step: int, num_steps: int) -> tuple[float, ...]:
    r"""Sparsity of the steps of a run from ``first_step`` on: growing, and ``sparsity`` in the mean.

    An error made early is carried through all steps that follow, so that the budget does more good there. The density
    of step :math:`i` is proportional to :math:`t_i^{-g}`, where :math:`t_i = (i + \frac12) / n` is its place in the
    run, and at most 1.

    Args:
        sparsity: mean share of block pairs dropped, in [0, 1).
        growth: the exponent :math:`g`; 0 gives every step the same.
        first_step: steps before it are dense.
        num_steps: steps of the run.

    >>> [round(x, 2) for x in growing_sparsity(0.75, 0.6, first_step=1, num_steps=5)]
    [0.65, 0.74, 0.79, 0.82]
    """
    return tuple(1 - density for density in _densities(_step_weights(growth, first_step, num_steps), 1 - sparsity))


def growing_schedule(
    sparsity: float, growth: float, first_step: int, num_steps: int, layers: Sequence[float] = ()
) -> SparsitySchedule:
    r"""A schedule whose sparsity grows over the steps as `growing_sparsity` and differs from layer to layer.

    The density of layer :math:`l` at step :math:`i` is proportional to :math:`a_l t_i^{-g}` and at most 1, and
    ``sparsity`` is the mean from ``first_step`` on. Shares are rounded to four digits.

    Args:
        sparsity: mean share of block pairs dropped, in [0, 1).
        growth: the exponent :math:`g`.
        first_step: steps before it are dense; a run with a shorter warm-up treats them as it.
        num_steps: steps of the run; each gets its own sparsity.
        layers: the weight :math:`a_l` of every layer, positive; none treats all layers alike.

    >>> growing_schedule(0.75, 0.6, first_step=2, num_steps=4, layers=(2, 1)).sparsity
    ((0.6331, 0.8166), (0.7002, 0.8501))
    """
    of_steps, of_layers = _step_weights(growth, first_step, num_steps), layers or (1.0,)
    densities = _densities([of_step * of_layer for of_step in of_steps for of_layer in of_layers], 1 - sparsity)
    shares = [min(round(1 - density, 4), 0.9999) for density in densities]
    rows = [tuple(shares[i : i + len(of_layers)]) for i in range(0, len(shares), len(of_layers))]
    ends = tuple((step + 1) / num_steps for step in range(first_step, num_steps))
    return SparsitySchedule(ends, tuple(rows) if layers else tuple(row[0] for row in rows))


def _step_weights(growth: float, first_step: int, num_steps: int) -> list[float]:
    return [((step + 0.5) / num_steps) ** -growth for step in range(first_step, num_steps)]


def _densities(weights: Sequence[float], mean: float) -> list[float]:
    """Densities proportional to weights, at most 1 and ``mean`` in the mean."""
    budget, remaining = mean * len(weights), sum(weights)
    found = [0.0] * len(weights)
    # from the largest, so that what a dense one leaves over goes to those after it
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        found[i] = min(1.0, budget * weights[i] / remaining)
        budget, remaining = budget - found[i], remaining - weights[i]
    return found


def _as_numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, (tuple, list)) or not values:
        raise InputError(f"{name} is {values!r}; it must be a list of numbers")
    if not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
        raise InputError(f"{name} is {values!r}; it must hold numbers")
    return tuple(float(value) for value in values)
