"""``draftattn bench``: figures anyone can reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from draftattn.cli import options
from draftattn.errors import InputError
from draftattn.files import check_writable

bench_app = typer.Typer(help="Measure speed; every figure names what was measured, on what.", no_args_is_help=True)


@bench_app.callback()
def _bench() -> None:
    pass


@bench_app.command()
@options.interruptible
def model(
    model: Annotated[
        str,
        typer.Option(
            help="Folder or repository with a pipeline, or an architecture with random weights: wan2.1-1.3b, "
            "wan2.1-14b, hunyuanvideo."
        ),
    ],
    height: Annotated[int, typer.Option(help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels.")] = 832,
    frames: Annotated[int, typer.Option(help="Number of frames.")] = 81,
    repeats: Annotated[int, typer.Option(help="Timed forward passes of each kind; the median counts.")] = 5,
    dtype: Annotated[options.Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")] = (
        options.Dtype.auto
    ),
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    preset: options.Preset = None,
    sparsity: options.Sparsity = None,
    selection: options.Selection = None,
    residual: options.Residual = None,
    tile: options.TileOption = None,
    dense_layers: options.DenseLayers = None,
    backend: options.Backend = None,
) -> None:
    """Time one forward pass of a transformer, dense and with draft attention.

    First checks that sparsity 0 equals dense; no time is reported if it does not.
    """
    from draftattn.eval.bench_model import bench_model
    from draftattn.eval.comparison import save_json

    config = options.draft_config(preset, sparsity, "0", selection, residual, tile, dense_layers, backend)
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; it must be at least 1")
    if output is not None:
        check_writable(output)
    device = options.default_device()
    console = Console()
    with console.status("measuring") as status:
        result = bench_model(
            model,
            height=height,
            width=width,
            num_frames=frames,
            config=config,
            repeats=repeats,
            dtype=options.resolve_dtype(dtype, device),
            device=device,
            on_progress=status.update,
        )
    table = Table("", "dense", "draft", title=result["title"], title_justify="left")
    table.add_row("forward pass, median", *(f"{result[kind]['seconds']:.4f} s" for kind in ("dense", "draft")))
    table.add_row("all", *(_range(result[kind]["all_seconds"]) for kind in ("dense", "draft")))
    table.add_row("speed-up", "", f"{result['speedup']:.2f}×")
    table.add_row("kernel", "", result["kernel"])
    table.add_row("density", "1", f"{result['draft']['density']:.4f}")
    table.add_row("making masks", "", f"{result['draft']['mask_seconds']:.4f} s")
    if result["dense"]["peak_memory_gib"] is not None:
        table.add_row("peak memory", *(f"{result[kind]['peak_memory_gib']:.2f} GiB" for kind in ("dense", "draft")))
    table.add_row("sparsity 0 against dense", "", f"relative error {result['gate']['relative_error']:.2e}")
    console.print(table)
    if output is not None:
        save_json(output, result)
        console.print(f"Wrote {output}")


def _range(seconds: list[float]) -> str:
    return f"{min(seconds):.4f} to {max(seconds):.4f} s"
