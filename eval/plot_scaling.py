"""A picture of ``draftattn bench scaling``: seconds of a pass against tokens, and against sparsity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from draftattn.errors import InputError
from draftattn.eval.plot_kernels import OTHER, check_plot_path
from draftattn.files import written_whole

# Okabe and Ito's colours, which most people with a colour vision deficiency tell apart.
DENSE_COLOURS = {"stock": "#555555", "dense": "#000000"}
DRAFT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
LABELS = {"stock": "stock diffusers", "dense": "best dense"}


def plot_scaling(result: dict[str, Any], path: Path) -> None:
    """Draws time against tokens on logarithmic axes, and beside it against sparsity.

    Args:
        result: what ``bench_scaling`` returned, or read back from its JSON file.
        path: where to; its ending chooses the format.

    Raises:
        InputError: if there is nothing to draw.
    """
    check_plot_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _lines(result["rows"])
    if not lines:
        raise InputError("the results hold no time; there is nothing to draw")
    curve = [row for row in result["curve"] if row["seconds"]]
    figure = Figure(figsize=(11 if curve else 6, 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if curve else 1, squeeze=False).flatten()
    _draw_tokens(axes[0], lines, result)
    if curve:
        _draw_sparsity(axes[1], curve, lines)
    versions, blocks = result["versions"], result["settings"]["blocks"]
    figure.suptitle(
        f"{result['model']}, {result['height']}×{result['width']}, random weights, one forward pass, scaled from "
        f"{blocks} of {' + '.join(str(count) for count in result['full_blocks'].values())} blocks and the rest; "
        f"{result['dtype']}, {result['device']}, torch {versions['torch']}",
        fontsize=9, color=OTHER,
    )  # fmt: skip
    with written_whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=160)


def _lines(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Tokens and seconds of each way to run the model, by its label."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["seconds"]:
            label = LABELS.get(row["kind"]) or f"draft, {100 * row['sparsity']:g} % sparsity"
            lines.setdefault(label, []).append((row["tokens"], row["seconds"]))
    return {label: sorted(points) for label, points in lines.items()}


def _draw_tokens(axis: Any, lines: dict[str, list[tuple[int, float]]], result: dict[str, Any]) -> None:
    drafts = iter(DRAFT_COLOURS * len(lines))
    colours = {LABELS[kind]: colour for kind, colour in DENSE_COLOURS.items()}
    axis.set_xscale("log")
    axis.set_yscale("log")
    for label, points in lines.items():
        dense = label in colours
        axis.plot(
            *zip(*points, strict=True),
            label=label, color=colours.get(label) or next(drafts), marker="o", markersize=4,
            linewidth=1.4 if dense else 2.2, linestyle=(0, (4, 2)) if label == LABELS["stock"] else "-",
        )  # fmt: skip
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    axis.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.6)
    axis.set_xticks(ticks, [f"{tokens / 1000:.3g}k" for tokens in ticks])
    times = [seconds for points in lines.values() for _, seconds in points]
    steps = [digit * 10.0**power for power in range(-4, 5) for digit in (1, 2, 5)]
    steps = [step for step in steps if min(times) / 2 <= step <= max(times) * 2]
    axis.set_yticks(steps, [f"{step:g}" for step in steps])
    _finish(axis, f"video tokens, by length at {result['height']}×{result['width']}")
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_locator(_no_ticks())
    axis.legend(frameon=False, fontsize=8.5)
    _name_speedups(axis, lines)


def _name_speedups(axis: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    """At the longest video, how many times as fast as the best dense attention each draft is."""
    dense = dict(lines.get(LABELS["dense"], ()))
    for label, points in lines.items():
        tokens, seconds = points[-1]
        if label.startswith("draft") and tokens in dense:
            axis.annotate(
                f"best dense / {dense[tokens] / seconds:.1f}", (tokens, seconds), (5, -3),
                textcoords="offset points", fontsize=8.5, color=OTHER,
            )  # fmt: skip


def _draw_sparsity(axis: Any, curve: list[dict[str, Any]], lines: dict[str, list[tuple[int, float]]]) -> None:
    points = sorted((100 * row["sparsity"], row["seconds"]) for row in curve)
    axis.plot(*zip(*points, strict=True), color=DRAFT_COLOURS[0], marker="o", markersize=4, linewidth=2.2)
    tokens = curve[0]["tokens"]
    for kind, colour in DENSE_COLOURS.items():
        seconds = dict(lines.get(LABELS[kind], ())).get(tokens)
        if seconds is not None:
            axis.axhline(seconds, color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
            axis.annotate(LABELS[kind], (points[0][0], seconds), (2, 3), textcoords="offset points", fontsize=8.5)
    axis.set_ylim(bottom=0)
    _finish(axis, f"sparsity: share of block pairs dropped, %, at {tokens:,} tokens")


def _finish(axis: Any, label: str) -> None:
    axis.set_xlabel(label)
    axis.set_ylabel("seconds of a forward pass")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axis.set_axisbelow(True)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
