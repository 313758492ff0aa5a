"""How ``draftattn bench model`` and ``draftattn bench scaling`` show their figures."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = {
    "attention": "self-attention kernel",
    "mask": "mask: pooling, scores, selection",
    "permutation": "token order at both ends",
    "cross-attention": "cross-attention kernel",
    "communication": "exchange between GPUs",
    "projections": "matrix products",
    "other": "norms, rotary, modulation, copies",
    "host": "device idle",
}


def print_model(console: Console, result: dict[str, Any]) -> None:
    """Prints passes, where their time goes, dense kernels, and whole runs."""
    console.print(f"\n[bold]{result['title']}[/bold]" + (", compiled blocks" if result["compiled"] else ""))
    if result["num_transformers"] > 1:
        console.print(f"{result['num_transformers']} transformers of this size share the steps of a run; one is timed")
    gate = result["gate"]
    console.print(
        f"sparsity 0 against stock on {sum(gate['blocks'].values())} blocks: relative error "
        f"{gate['relative_error']:.1e}, best dense {gate['dense_relative_error']:.1e}, allowed {gate['allowed']:.1e}",
        highlight=False,
    )
    console.print(_passes(result))
    profiled = [row for row in result["runs"] if row.get("profile")]
    if profiled:
        console.print(_split(profiled))
    for name, title in (("self", "Dense self-attention, one layer"), ("cross", "Cross-attention, one layer")):
        if name in result["dense_kernels"]:
            console.print(_dense_kernels(result["dense_kernels"][name], title))
    if result["stages"] is not None:
        for line in _stages(result["stages"]):
            console.print(line, highlight=False)
    if result["whole_runs"]:
        console.print(_whole_runs(result))


def print_scaling(console: Console, result: dict[str, Any]) -> None:
    """Prints the time of a pass by tokens and by sparsity."""
    kinds = list(dict.fromkeys(_name(row) for row in result["rows"]))
    table = Table("tokens", "frames", *kinds, title=result["title"], title_justify="left")
    for size in dict.fromkeys((row["tokens"], row["num_frames"]) for row in result["rows"]):
        found = {_name(row): row for row in result["rows"] if (row["tokens"], row["num_frames"]) == size}
        table.add_row(f"{size[0]:,}", str(size[1]), *(_seconds(found.get(kind)) for kind in kinds))
    console.print(table)
    if result["curve"]:
        table = Table("", "density", "pass", title=f"{result['curve'][0]['tokens']:,} tokens", title_justify="left")
        for row in result["curve"]:
            table.add_row(_name(row), f"{row['density']:.3f}", _seconds(row))
        console.print(table)


def _passes(result: dict[str, Any]) -> Table:
    passes = result["passes_per_step"]
    columns = ["", "kernel", "pass, median", "all", "× stock", "× best dense", "density", "peak memory"]
    if passes > 1:
        columns.insert(4, f"step ({passes} passes)")
    table = Table(*columns)
    for row in result["runs"]:
        if "error" in row:
            table.add_row(_name(row), "", row["error"])
            continue
        kernel = {"stock": "diffusers' default", "dense": row.get("kernel", ""), "draft": result["kernel"]}[row["kind"]]
        cells = [_name(row), kernel, f"{row['seconds']:.4g} s", _range(row["all_seconds"])]
        if passes > 1:
            cells.append(f"{row['step_seconds']:.4g} s")
        cells += [_ratio(row["speedup_over_stock"]), _ratio(row["speedup_over_dense"])]
        cells.append(f"{row.get('density', 1):.4f}")
        peak = row["peak_memory_gib"]
        cells.append("" if peak is None else f"{peak:.2f} GiB")
        table.add_row(*cells)
    return table


def _split(rows: list[dict[str, Any]]) -> Table:
    table = Table("one profiled pass", *(_name(row) for row in rows))
    for part, words in PARTS.items():
        if part == "communication" and not any(row["profile"]["parts"][part] for row in rows):
            continue
        table.add_row(words, *(_share(row["profile"], part) for row in rows))
    table.add_section()
    table.add_row("sum", *(f"{row['profile']['seconds']:.4g} s" for row in rows))
    table.add_row("mask and order", *(f"{100 * row['profile']['overhead']:.1f} %" for row in rows))
    return table


def _share(profile: dict[str, Any], part: str) -> str:
    seconds = profile["parts"][part]
    return f"{seconds:.4f} s, {100 * seconds / profile['seconds']:.1f} %"


def _dense_kernels(measured: dict[str, Any], title: str) -> Table:
    shape = measured["shape"]
    title = f"{title}: {shape['queries']:,} × {shape['keys']:,} tokens, {shape['heads']} heads"
    table = Table("kernel", "median", "", title=title, title_justify="left")
    for row in measured["rows"]:
        words = [word for word in ("fastest", "auto") if measured[word] == row["kernel"]]
        if "seconds" in row:
            table.add_row(row["kernel"], f"{1e3 * row['seconds']:.3f} ms", ", ".join(words))
        else:
            table.add_row(row["kernel"], "", "; ".join(row["reasons"]))
    return table


def _stages(stages: dict[str, Any]) -> list[str]:
    text, decode = stages["text"], stages["decode"]
    how = f"{decode['dtype']}, {'in tiles' if decode['tiled'] else 'whole'}"
    return [
        f"text encoding {text['seconds']:.3f} s{_peak(text)}",
        f"decoding ({how}): " + (decode.get("error") or f"{decode['seconds']:.2f} s{_peak(decode)}"),
    ]


def _peak(stage: dict[str, Any]) -> str:
    return "" if stage["peak_memory_gib"] is None else f", peak memory {stage['peak_memory_gib']:.1f} GiB"


def _whole_runs(result: dict[str, Any]) -> Table:
    steps = f"{result['num_steps']} steps of {result['passes_per_step']} passes"
    table = Table(
        "sparsity", "warm-up", "cached", "stock", "best dense", "draft", "× stock", "× best dense",
        title=f"Whole run, {steps}, text encoding and decoding included", title_justify="left",
    )  # fmt: skip
    for run in result["whole_runs"]:
        stock = run["stock_seconds"]
        table.add_row(
            f"{run['sparsity']:g}",
            f"{100 * run['warmup']:g} %, {run['warmup_steps']} steps",
            f"{100 * run['cache_share']:g} %",
            "" if stock is None else f"{stock:.1f} s",
            f"{run['dense_seconds']:.1f} s",
            f"{run['draft_seconds']:.1f} s",
            _ratio(run["speedup_over_stock"]),
            _ratio(run["speedup_over_dense"]),
        )
    return table


def _name(row: dict[str, Any]) -> str:
    return f"{100 * row['sparsity']:g} % sparsity" if row["kind"] == "draft" else {"stock": "stock dense"}.get(
        row["kind"], "best dense"
    )  # fmt: skip


def _seconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return row["error"] if row.get("error") else f"{row['seconds']:.4g} s"


def _range(seconds: list[float]) -> str:
    return f"{min(seconds):.4g} to {max(seconds):.4g} s" if len(seconds) > 1 else ""


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"
