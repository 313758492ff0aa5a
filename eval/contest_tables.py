"""What a contest's rows say at equal time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from draftattn.eval.metrics import METRICS

Point = tuple[float, float]


def at_equal_time(
    rows: Sequence[dict[str, Any]], contenders: Iterable[str], time: str = "seconds"
) -> list[dict[str, Any]]:
    """Every contender at the time of the reference's settings.

    The reference is the first contender. For each of its rows and each contender with the same warm-up, the best value
    of every metric is taken that the contender reaches within that time, on straight lines between its densities over
    the logarithm of the time (`within_time`).

    Args:
        rows: figures of every contender, density and warm-up.
        contenders: their names.
        time: the figure that is a row's time.

    Returns:
        One entry for every warm-up, density of the reference and contender: ``reference``, its ``target_density``,
        ``seconds`` and ``warmup``, and ``contender`` with its metrics; None where it is nowhere so fast.
    """
    names = list(contenders)
    found = []
    for reference in (row for row in rows if row["contender"] == names[0]):
        for name in names:
            own = [row for row in rows if row["contender"] == name and row["warmup"] == reference["warmup"]]
            own.sort(key=lambda row: row["density"])
            entry = {
                "time": time,
                "reference": names[0],
                "target_density": reference["target_density"],
                "warmup": reference["warmup"],
                "seconds": reference[time],
                "contender": name,
            }
            for metric, about in METRICS.items():
                if metric in reference:
                    points = [(row[time], math.inf if row[metric] is None else row[metric]) for row in own]
                    entry[metric] = within_time(points, reference[time], about.higher_is_better)
            found.append(entry)
    return found


def within_time(points: Sequence[Point], seconds: float, higher_is_better: bool) -> float | None:
    """The best value on a broken line of times and values that takes no longer than ``seconds``.

    Between neighbours the value is linear in the logarithm of the time. None if no point is so fast.

    Args:
        points: times and values, neighbours next to each other.
        seconds: the time allowed.
        higher_is_better: what best means.

    >>> within_time([(1.0, 10.0), (4.0, 20.0)], 2.0, True)
    15.0
    >>> within_time([(1.0, 10.0), (4.0, 20.0)], 9.0, True), within_time([(1.0, 10.0), (4.0, 20.0)], 0.5, True)
    (20.0, None)
    """
    reached = [value for time, value in points if time <= seconds]
    for (time, value), (next_time, next_value) in pairwise(points):
        if min(time, next_time) <= seconds < max(time, next_time) and math.isfinite(value + next_value):
            share = math.log(seconds / time) / math.log(next_time / time)
            reached.append(value + share * (next_value - value))
    if not reached:
        return None
    best = max(reached) if higher_is_better else min(reached)
    return None if math.isinf(best) else round(best, 5)
