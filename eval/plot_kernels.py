"""A picture of ``draftattn bench kernels``: speed-up over dense attention against density."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from draftattn.errors import InputError
from draftattn.files import written_whole

# Okabe and Ito's colours, which most people with a colour vision deficiency tell apart.
COLOURS = {"hopper": "#0072B2", "triton": "#009E73", "cpu": "#0072B2", "fa4": "#D55E00", "flex": "#CC79A7"}
OTHER = "#555555"
LABELS = {"hopper": "draftattn, Hopper", "triton": "draftattn, Triton", "cpu": "draftattn, CPU"}
LABELS |= {"fa4": "FlashAttention-4", "flex": "FlexAttention"}
DENSE = {"cudnn": "cuDNN", "torch": "torch's"}
MARKS = {"hopper": "o", "triton": "s", "cpu": "o", "fa4": "^", "flex": "D"}
SUFFIXES = (".svg", ".png", ".pdf")


def check_plot_path(path: Path) -> None:
    """Checks that a picture of that name can be drawn, before anything is measured.

    Raises:
        InputError: if the ending is unknown or matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"plot {str(path)!r} must end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("a plot needs matplotlib, which is not installed: pip install matplotlib") from None


def plot_kernels(result: dict[str, Any], path: Path) -> None:
    """Draws one panel a shape and one line a kernel, on logarithmic axes, with the ideal ``1 / density``.

    Args:
        result: what ``bench_kernels`` returned, or read back from its JSON file.
        path: where to; its ending chooses the format.

    Raises:
        InputError: if there is nothing to draw.
    """
    check_plot_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(item, _lines(item["rows"])) for item in result["shapes"]]
    panels = [(item, lines) for item, lines in panels if lines]
    if not panels:
        raise InputError("the results hold no sparse kernel's time; there is nothing to draw")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 4.3 * rows + 0.35), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (item, lines) in zip(axes, panels, strict=False):
        _draw(axis, item, lines)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    versions = result["versions"]
    figure.suptitle(
        f"{result['device']}, torch {versions['torch']}, Triton {versions['triton']}", fontsize=9, color=OTHER
    )
    with written_whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=160)


def _lines(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Density and speed-up of each sparse kernel, from dense to sparse."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["kind"] == "sparse" and row.get("speedup_over_dense"):
            lines.setdefault(row["kernel"], []).append((row["density"], row["speedup_over_dense"]))
    return {name: sorted(points, reverse=True) for name, points in lines.items()}


def _draw(axis: Any, item: dict[str, Any], lines: dict[str, list[tuple[float, float]]]) -> None:
    shape = item["shape"]
    densities = sorted({density for points in lines.values() for density, _ in points}, reverse=True)
    speeds = [speed for points in lines.values() for _, speed in points]
    dense = next((DENSE.get(row["kernel"], row["kernel"]) for row in item["rows"] if row["kind"] == "dense"), "dense")
    axis.set_xscale("log")
    axis.set_yscale("log")
    least, most = densities[-1], densities[0]
    span = (most / least) if most > least else 2.0
    # sparser to the right, with room for the names of the lines
    axis.set_xlim(most * span**0.06, least * span**-0.62)
    axis.plot((most, least), (1 / most, 1 / least), color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.axhline(1.0, color="#DDDDDD", linewidth=1, zorder=0)
    bottom, top = min([0.9, *speeds]) * 0.9, max([*speeds, 1 / least]) * 1.45
    axis.set_ylim(bottom, top)
    ends: list[tuple[float, str, str]] = [(1 / least, "1 / density", "#777777")]
    # ours on top
    for name in sorted(lines, key=lambda name: name in ("hopper", "cpu")):
        points = lines[name]
        colour = COLOURS.get(name, OTHER)
        ours = name in ("hopper", "triton", "cpu")
        axis.plot(
            *zip(*points, strict=True),
            color=colour, marker=MARKS.get(name, "x"), markersize=5, linewidth=2.2 if ours else 1.4, zorder=3,
        )  # fmt: skip
        ends.append((points[-1][1], f"{LABELS.get(name, name)} {points[-1][1]:.1f}×", colour))
    for height, (speed, label, colour) in zip(_apart(ends, bottom, top), sorted(ends), strict=True):
        axis.annotate(
            label, (least, speed), (least * span**-0.05, height),
            color=colour, fontsize=8.5, va="center", ha="left",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )  # fmt: skip
    from matplotlib.ticker import NullFormatter, NullLocator

    axis.set_xticks(densities, [f"{density:.2g}" for density in densities])
    ticks = [x for x in (0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 15, 20) if bottom <= x <= top]
    axis.set_yticks(ticks, [f"{x:g}×" for x in ticks])
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_locator(NullLocator())
        side.set_minor_formatter(NullFormatter())
    axis.set_xlabel("density: share of query-key pairs computed")
    axis.set_ylabel(f"times as fast as {dense} dense attention")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axis.set_axisbelow(True)
    kind = ("causal, " if shape["causal"] else "") + ("ragged blocks, " if shape["real_blocks"] else "")
    axis.set_title(
        f"{shape['name']}\n{shape['heads']} heads × {shape['tokens']:,} tokens, head_dim {shape['head_dim']}, "
        f"{kind}{shape['dtype']}",
        fontsize=10, loc="left",
    )  # fmt: skip


def _apart(ends: list[tuple[float, str, str]], bottom: float, top: float) -> list[float]:
    """Heights for labels, in the order of their speeds, that leave each a line of its own.

    >>> [round(x, 2) for x in _apart([(4.0, "a", ""), (4.0, "b", "")], 1.0, 10.0)]
    [4.0, 4.61]
    """
    step = (top / bottom) ** 0.062
    heights: list[float] = []
    for speed, _, _ in sorted(ends):
        heights.append(max(speed, heights[-1] * step) if heights else speed)
    # those pushed above the frame push the ones below them down
    limit = top / step**0.7
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = min(heights[i], limit)
        limit = heights[i] / step
    return heights
