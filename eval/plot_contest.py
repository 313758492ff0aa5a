"""A picture of ``draftattn bench policies``: quality against the time of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from draftattn.errors import InputError
from draftattn.eval.metrics import METRICS
from draftattn.eval.plot_kernels import OTHER, check_plot_path
from draftattn.files import written_whole

# Okabe and Ito's colours, which most people with a colour vision deficiency tell apart; ours are the strong ones.
COLOURS = {"published": "#D55E00", "draft": "#0072B2", "oracle": "#999999", "random": "#BBBBBB"}
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7B4173")
MARKS = ("s", "^", "D", "v", "P", "X", "*")
SHOWN = ("psnr", "lpips")


def plot_contest(result: dict[str, Any], path: Path) -> None:
    """Draws a row of panels for each metric and a column for each warm-up; a line joins a policy's densities.

    Args:
        result: what ``write_contest`` returned, or read back from its JSON file.
        path: where to; its ending chooses the format.

    Raises:
        InputError: if there is nothing to draw, or matplotlib is missing.
    """
    check_plot_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["rows"]
    # where a larger video was timed, its times say more about use
    time = "large_seconds" if rows and "large_seconds" in rows[0] else "seconds"
    size = [result[side] for side in ("height", "width", "num_frames")]
    timed = "×".join(map(str, size if time == "seconds" else result["time_size"]))
    metrics = [name for name in SHOWN if rows and name in rows[0]]
    if not metrics:
        raise InputError("the results hold no quality of videos; there is nothing to draw")
    warmups = list(dict.fromkeys(row["warmup"] for row in rows))
    figure = Figure(figsize=(5.4 * len(warmups) + 1.6, 3.9 * len(metrics)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(metrics), len(warmups), squeeze=False, sharex=True)
    styles = _styles(list(dict.fromkeys(row["contender"] for row in rows)))
    for i, metric in enumerate(metrics):
        for axis, warmup in zip(axes[i], warmups, strict=True):
            _draw(axis, [row for row in rows if row["warmup"] == warmup], metric, time, styles)
            axis.axvline(1e3 * result[f"dense_{time}"], color="#777777", linewidth=1, linestyle=(0, (4, 3)))
            if i == 0:
                axis.set_title(f"warm-up {100 * warmup:g} % of the steps", fontsize=10, loc="left")
            if i == len(metrics) - 1:
                axis.set_xlabel(f"ms of one attention at {timed}, its mask included (dashed: dense)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)
    figure.suptitle(
        f"{result['model']}, videos of {'×'.join(map(str, size))}, {result['num_steps']} steps, "
        f"{len(result['prompts'])} prompts, {len(result['seeds'])} seeds, {result['device']}",
        fontsize=9,
        color=OTHER,
    )
    with written_whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=160)


def _styles(contenders: list[str]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    others = 0
    for name in contenders:
        policy = name.partition("+")[0]
        if policy in COLOURS:
            bound = policy in ("oracle", "random")
            style = {"color": COLOURS[policy], "marker": "." if bound else "o", "linewidth": 1.2 if bound else 2.2}
        else:
            style = {"color": OTHERS[others % len(OTHERS)], "marker": MARKS[others % len(MARKS)], "linewidth": 1.3}
            others += 1
        # a policy with something changed
        styles[name] = {**style, "linestyle": (0, (1, 1)) if "+" in name else "-"}
    return styles


def _draw(axis: Any, rows: list[dict[str, Any]], metric: str, time: str, styles: dict[str, dict[str, Any]]) -> None:
    for name, style in styles.items():
        own = sorted((row for row in rows if row["contender"] == name), key=lambda row: row["density"])
        points = [(1e3 * row[time], row[metric]) for row in own if row[metric] is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=name, markersize=5, zorder=3 if name == "draft" else 2, **style)
    from matplotlib.ticker import NullLocator

    about = METRICS[metric]  # type: ignore[index]
    axis.set_xscale("log")
    times = [1e3 * row[time] for row in rows]
    steps = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
    steps = [step for step in steps if min(times) / 2 <= step <= max(times) * 2]
    axis.set_xticks(steps, [f"{step:g}" for step in steps])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(min(times) / 1.2, max(times) * 1.2)
    better = "higher" if about.higher_is_better else "lower"
    axis.set_ylabel(f"{f'{about.title} {about.unit}'.strip()}, {better} is better")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#EEEEEE", linewidth=0.8)
    axis.set_axisbelow(True)
