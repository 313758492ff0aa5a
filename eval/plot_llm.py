"""Pictures of ``draftattn llm``: perplexity against density, speed against length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftattn.errors import InputError
from draftattn.eval.llm_specs import DENSE
from draftattn.eval.plot_kernels import check_plot_path
from draftattn.files import written_whole

# Okabe and Ito's colours, which most people with a colour vision deficiency tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#777777", "#B2182B")
MARKS = "os^DvP*X<>"
LEAST = 1e-3  # share above the dense perplexity that a logarithmic axis begins with


def plot_llm(result: dict[str, Any], path: Path) -> None:
    """Draws the figures of one run.

    Args:
        result: of ``measure_perplexity`` as `perplexity_report` gives it, of ``bench_attention`` or of
            ``bench_generation``; or read back from its JSON file.
        path: where to; its ending chooses the format.

    Raises:
        InputError: if there is nothing to draw.
    """
    check_plot_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["system"] != DENSE]
    if not rows:
        raise InputError("the results hold no system's figures; there is nothing to draw")
    by_length: dict[int, list[dict[str, Any]]] = {}
    if "kind" not in result:
        for row in rows:
            if row["density"] is not None:
                by_length.setdefault(row["length"], []).append(row)
        if not by_length:
            raise InputError("the results hold no system's density; there is nothing to draw")
    panels = max(1, len(by_length))
    figure = Figure(figsize=(1.6 + 4.8 * panels, 4.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis, (length, points) in zip(axes, by_length.items(), strict=False):
        _perplexity(axis, points)
        axis.set_title(f"{result['model']} on {result['text']}, {length:,} tokens", fontsize=8)
    if by_length:
        axes[0].set_ylabel(f"perplexity above dense; {LEAST:.1%} and less at the bottom")
    else:
        attention = result["kind"] == "attention"
        _speed(axes[0], rows, "speedup" if attention else "prefill_speedup")
        what = "prefill attention" if attention else f"prefill of {result['model']}"
        axes[0].set_title(f"{what}, {result['dtype']}, {result['device']}", fontsize=9)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7, frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=160)


def _perplexity(axis: Any, rows: list[dict[str, Any]]) -> None:
    def name(row: dict[str, Any]) -> str:
        # numbers are what the density follows from; switches and words make another system
        words = {
            option if value is True else f"{option} {value}"
            for option, value in row["options"].items()
            if value is True or (isinstance(value, str) and value.isidentifier())
        }
        switches = ", ".join(sorted(words))
        return f"{row['system']} ({switches})" if switches else row["system"]

    _draw(axis, rows, name, lambda row: (row["density"], max(row["against_dense"] - 1, LEAST)))
    axis.set_yscale("log")  # the worst would press the others flat
    axis.yaxis.set_major_formatter(lambda value, _: f"{value * 100:g} %")
    axis.set_xlabel("density: share of causal pairs computed")


def _speed(axis: Any, rows: list[dict[str, Any]], figure: str) -> None:
    def name(row: dict[str, Any]) -> str:
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        return f"{row['system']} ({options})" if options else row["system"]

    _draw(axis, rows, name, lambda row: (row["length"], row[figure]))
    axis.axhline(1, color="#555555", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(sorted({row["length"] for row in rows}))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("tokens")
    axis.set_ylabel("times as fast as dense")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")


def _draw(
    axis: Any,
    rows: list[dict[str, Any]],
    name: Callable[[dict[str, Any]], str],
    point: Callable[[dict[str, Any]], tuple[float, float]],
) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(name(row), []).append(point(row))
    for i, (label, points) in enumerate(lines.items()):
        x, y = zip(*sorted(points), strict=True)
        axis.plot(x, y, marker=MARKS[i % len(MARKS)], color=COLOURS[i % len(COLOURS)], label=label, linewidth=1.4)
