"""How ``draftattn bench kernels`` shows its figures."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

TITLES = {
    "dense": "Dense",
    "sparse": "Block-sparse",
    "residual": "Block-sparse with the residual",
    "dense backward": "Dense, backward pass",
    "backward": "Block-sparse, backward pass",
}


def print_shape(console: Console, measured: dict[str, Any], device: str) -> None:
    """Prints the gate, the times and the cost of masks of one shape."""
    shape = measured["shape"]
    heads = f"{shape['heads']} heads" + (
        f" ({shape['kv_heads']} of keys)" if shape["kv_heads"] != shape["heads"] else ""
    )
    words = [heads, f"{shape['tokens']:,} tokens", f"head_dim {shape['head_dim']}", shape["dtype"]]
    words += ["causal"] * shape["causal"] + ["ragged blocks"] * shape["real_blocks"] + [device]
    console.print(f"\n[bold]{shape['name']}[/bold]: {', '.join(words)}")
    if clocks := measured["clocks"]:
        console.print(
            f"dense under load: {clocks['sm_mhz']:.0f} MHz, {clocks['power_w']:.0f} of "
            f"{clocks['power_limit_w']:.0f} W, {clocks['temperature_c']:.0f} °C"
        )
    for verdict in measured["gate"]:
        if not verdict["green"]:
            why = verdict["failure"] or f"relative error {verdict['error']}, allowed {verdict['allowed']}"
            console.print(f"[red]wrong[/red] {verdict['kernel']} ({verdict['case']}): {why}", highlight=False)
    fa4_ran = any(row.get("speedup_over_fa4") for row in measured["rows"])
    against = next((row["kernel"] for row in measured["rows"] if row["kind"] == "dense"), "dense")
    for kind, title in TITLES.items():
        rows = [row for row in measured["rows"] if row["kind"] == kind]
        if any("seconds" in row for row in rows):
            console.print(_times(rows, title, against, fa4_ran))
    if masks := [row for row in measured["rows"] if row["kind"] == "mask"]:
        console.print(_masks(masks))
    for name, why in _absent(measured["rows"]).items():
        console.print(f"{name} did not run: {why}", highlight=False, markup=False)


def _times(rows: list[dict[str, Any]], title: str, against: str, fa4_ran: bool) -> Table:
    kind = rows[0]["kind"]
    columns = ["kernel", "density", "median ms", "min to max", "TFLOP/s", f"× {against}"]
    columns += ["× fa4"] * (fa4_ran and kind in ("sparse", "residual")) + ["time / plain"] * (kind == "residual")
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    density = rows[0]["density"]
    for row in rows:
        if "seconds" not in row:
            continue
        if row["density"] != density:
            density = row["density"]
            table.add_section()
        times = row["seconds"]
        cells = [
            f"[bold]{row['kernel']}[/bold]" if row["ours"] else row["kernel"],
            f"{row['density']:.4g}",
            f"{1e3 * times['median']:.3f}",
            f"{1e3 * times['min']:.3f} to {1e3 * times['max']:.3f}",
            f"{row['tflops']:.3g}" if row["tflops"] < 1 else f"{row['tflops']:.0f}",
            _ratio(row.get("speedup_over_dense")),
        ]
        if fa4_ran and kind in ("sparse", "residual"):
            cells.append(_ratio(row.get("speedup_over_fa4")))
        if kind == "residual":
            cells.append(_ratio(row.get("time_over_plain"), 3))
        table.add_row(*cells)
    return table


def _masks(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "", "median ms", "min to max", "share of our kernel", title=f"Making a mask of density {rows[0]['density']:g}",
        title_justify="left",
    )  # fmt: skip
    for row in rows:
        times, share = row["seconds"], row["share_of_kernel"]
        table.add_row(
            row["kernel"],
            f"{1e3 * times['median']:.3f}",
            f"{1e3 * times['min']:.3f} to {1e3 * times['max']:.3f}",
            "" if share is None else f"{100 * share:.1f} %",
        )
    return table


def _absent(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Kernels that could not serve, and why; once each."""
    absent: dict[str, str] = {}
    for row in rows:
        if "reasons" in row:
            absent.setdefault(f"{row['kernel']} ({row['kind']})", "; ".join(row["reasons"]))
    return absent


def _ratio(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
