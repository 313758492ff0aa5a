"""Means of a study's rows for each setting."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from draftattn.eval.metrics import METRICS

# Columns of a row whose mean says something.
FIGURES = ("density", "step_seconds", "dense_step_seconds", "speedup", "run_speedup")


def summarise(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each setting, in order of appearance.

    Args:
        rows: lines of ``results.jsonl``.

    Returns:
        For every setting its name, the number of videos, the mean of each figure, the mean of every metric's mean over
        frames (``psnr``) and its worst frame of all videos (``psnr_worst``). Infinity stands for identical videos.

    >>> rows = [{"setting": "a", "speedup": 1.0, "psnr_mean": 30.0, "psnr_worst": 20.0},
    ...         {"setting": "a", "speedup": 2.0, "psnr_mean": 20.0, "psnr_worst": 10.0}]
    >>> summarise(rows)
    [{'setting': 'a', 'videos': 2, 'speedup': 1.5, 'psnr': 25.0, 'psnr_worst': 10.0}]
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["setting"], []).append(row)
    return [{"setting": name, "videos": len(group), **_means(group)} for name, group in groups.items()]


def _means(group: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for figure in FIGURES:
        if figure in group[0]:
            found[figure] = fmean(row[figure] for row in group)
    for name, metric in METRICS.items():
        if f"{name}_mean" not in group[0]:
            continue
        means, worst = ([_number(row[f"{name}_{part}"]) for row in group] for part in ("mean", "worst"))
        found[name] = fmean(means)
        found[f"{name}_worst"] = min(worst) if metric.higher_is_better else max(worst)
    return found


def _number(value: float | None) -> float:
    """JSON has no infinity; None stands for it."""
    return math.inf if value is None else value
