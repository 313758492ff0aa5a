"""Tables of ``draftattn llm``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table

ABOVE_ONE = "a density above 1 adds up branches: each of nsa's three computes pairs of its own"


def density_note(densities: Iterable[float | None]) -> str | None:
    """What a density above 1 means, where there is one."""
    return ABOVE_ONE if any(density is not None and round(density, 3) > 1 for density in densities) else None


def perplexity_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of `draftattn.eval.perplexity.measure_perplexity`."""
    table = Table(box=box.SIMPLE, caption=_caption(rows), caption_justify="left")
    for heading in ("system", "tokens", "density", "perplexity", "× dense", "last quarter", "seconds"):
        table.add_column(heading, justify="left" if heading == "system" else "right", overflow="fold")
    for row in rows:
        table.add_row(
            _name(row),
            str(row["length"]),
            _number(row["density"], ".3f"),
            f"{row['perplexity']:.3f}",
            f"{row['against_dense']:.3f}",
            f"{row['last_quarter']:.3f}",
            f"{row['seconds']:.2f}",
        )
    return table


def attention_table(result: dict[str, Any]) -> Table:
    """The result of `draftattn.eval.bench_llm.bench_attention`."""
    shape = result["shape"]
    table = Table(
        box=box.SIMPLE,
        title=f"prefill attention, {shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}, "
        f"{result['dtype']}, {result['device']}; × against {result['baseline']}",
        title_justify="left",
        caption=_caption(result["rows"]),
        caption_justify="left",
    )
    for heading in ("tokens", "system", "density", "ms", "of it selection", "×"):
        table.add_column(heading, justify="left" if heading == "system" else "right", overflow="fold")
    for row in result["rows"]:
        selection = row["selection_seconds"]
        table.add_row(
            str(row["length"]),
            _name(row),
            _number(row["density"], ".3f"),
            f"{1e3 * row['seconds']['median']:.3f}",
            "" if selection is None else f"{1e3 * selection:.3f}",
            f"{row['speedup']:.2f}",
        )
    return table


def generation_table(result: dict[str, Any]) -> Table:
    """The result of `draftattn.eval.bench_llm.bench_generation`."""
    table = Table(
        box=box.SIMPLE,
        title=f"{result['model']}, {result['dtype']}, {result['device']}",
        caption=_caption(result["rows"]),
        caption_justify="left",
    )
    for heading in ("tokens", "system", "density", "prefill ms", "×", "decode ms a token", "×"):
        table.add_column(heading, justify="left" if heading == "system" else "right", overflow="fold")
    for row in result["rows"]:
        table.add_row(
            str(row["length"]),
            _name(row),
            _number(row["density"], ".3f"),
            f"{1e3 * row['prefill_seconds']:.2f}",
            f"{row['prefill_speedup']:.2f}",
            f"{1e3 * row['decode_seconds']:.3f}",
            f"{row['decode_speedup']:.2f}",
        )
        if (stock := row.get("stock_decode_seconds")) is not None:
            speedup = row["decode_seconds"] / stock
            table.add_row("", "stock, as torch chooses", "", "", "", f"{1e3 * stock:.3f}", f"{speedup:.2f}")
    return table


def _caption(rows: list[dict[str, Any]]) -> str | None:
    return density_note(row["density"] for row in rows)


def _name(row: dict[str, Any]) -> str:
    from draftattn.eval.llm_specs import SystemSpec

    return SystemSpec(row["system"], tuple(row["options"].items())).text


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else format(value, shape)
