"""``draftattn bench model`` and ``draftattn bench scaling``: what a step and a whole run take."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from draftattn.cli import options
from draftattn.cli.processes import Processes, join_processes
from draftattn.cli.tables import wide_console
from draftattn.errors import InputError
from draftattn.files import check_writable

MODEL_EXAMPLE = (
    "Example: draftattn bench model --model hunyuanvideo --sparsity 0.75,0.9 --repeats 1 --output hunyuanvideo.json"
)
SCALING_EXAMPLE = "Example: draftattn bench scaling --model hunyuanvideo --output scaling.json --plot scaling.svg"
DEFAULT_SPARSITIES: tuple[float, ...] = (0.75, 0.9)
NAMES = "wan2.1-1.3b, wan2.1-14b, wan2.2-a14b, wan2.2-ti2v-5b, hunyuanvideo, hunyuanvideo-1.5"

Height = Annotated[int | None, typer.Option(help="Pixels. Default: the model's recipe.")]
Width = Annotated[int | None, typer.Option(help="Pixels. Default: the model's recipe.")]
Frames = Annotated[int | None, typer.Option(help="Number of frames. Default: the model's recipe.")]
Sparsities = Annotated[
    str | None,
    typer.Option(
        "--sparsity",
        help="Shares of block pairs dropped, by commas. Default 0.75,0.9.",
        rich_help_panel=options.DRAFT_PANEL,
    ),
]
DtypeOption = Annotated[options.Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")]
Stock = Annotated[
    bool, typer.Option("--stock/--no-stock", help="Also time stock diffusers, as a user has it without us.")
]


@options.interruptible
def model(
    model: Annotated[
        str,
        typer.Option(help=f"Folder or repository with a pipeline, or an architecture with random weights: {NAMES}."),
    ],
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    repeats: Annotated[int, typer.Option(help="Timed forward passes of each kind; the median counts.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Steps of a whole run. Default: the model's recipe.")] = None,
    warmups: Annotated[str, typer.Option(help="Shares of dense steps of the whole runs, by commas.")] = "0.25,0.1,0",
    cache_shares: Annotated[
        str | None,
        typer.Option(
            help="Shares of the sparse passes that FirstBlockCache skips, by commas, for further whole runs; the time "
            "of a skipped pass is measured."
        ),
    ] = None,
    guidance: Annotated[
        bool, typer.Option("--guidance/--no-guidance", help="Count a second pass a step where guidance takes one.")
    ] = True,
    stock: Stock = True,
    stages: Annotated[
        bool, typer.Option("--stages/--no-stages", help="Also measure text encoding and decoding, for whole runs.")
    ] = True,
    profile: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Split one more pass of each by what its time goes to.")
    ] = True,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the repeated blocks first, of stock diffusers too.")
    ] = False,
    context_parallel: Annotated[
        bool,
        typer.Option(
            "--context-parallel", help="Share the transformer between GPUs (Ulysses); start with torchrun. Wan only."
        ),
    ] = False,
    dtype: DtypeOption = options.Dtype.auto,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    preset: options.Preset = None,
    sparsity: Sparsities = None,
    selection: options.Selection = None,
    residual: options.Residual = None,
    tile: options.TileOption = None,
    dense_layers: options.DenseLayers = None,
    backend: options.Backend = None,
    dense_backend: options.DenseBackend = None,
) -> None:
    """Time a step and work out a whole run: stock dense, best dense and draft attention.

    First checks on the first blocks that sparsity 0 and the best dense kernel equal stock attention; no time is
    reported if they do not.
    """
    from draftattn.cli.model_tables import print_model
    from draftattn.eval.architectures import recipe_of
    from draftattn.eval.bench_model import BenchSettings, bench_model
    from draftattn.eval.comparison import save_json
    from draftattn.eval.contestants import OUT_OF_MEMORY

    config = options.draft_config(
        preset_name=preset,
        sparsity=None,
        warmup="0",
        selection=selection,
        residual=residual,
        tile=tile,
        dense_layers=dense_layers,
        backend=backend,
        dense_backend=dense_backend,
    )
    sparsities = DEFAULT_SPARSITIES if preset is None else (config.sparsity,)
    if sparsity is not None:
        sparsities = read_shares("sparsity", sparsity)
    processes = Processes(0, 1, options.default_device())
    if context_parallel:
        processes = join_processes(options.default_device())
        if processes.count < 2:
            raise InputError("--context-parallel takes several processes: torchrun --nproc-per-node 2 -m draftattn …")
    settings = BenchSettings(
        sparsities=sparsities,
        repeats=repeats,
        num_steps=steps,
        guidance=guidance,
        warmups=read_shares("warmups", warmups),
        cache_shares=() if cache_shares is None else read_shares("cache-shares", cache_shares),
        stock=stock,
        stages=stages,
        profile=profile,
        compiled=compile_blocks,
        context_parallel=processes.count,
    )
    if output is not None:
        check_writable(output)
    recipe = recipe_of(model)
    console = wide_console()
    result = bench_model(
        model,
        height=recipe.height if height is None else height,
        width=recipe.width if width is None else width,
        num_frames=recipe.num_frames if frames is None else frames,
        config=config,
        settings=settings,
        dtype=options.resolve_dtype(dtype, processes.device),
        device=processes.device,
        on_progress=progress(console) if processes.is_main else lambda message: None,
    )
    if not processes.is_main:
        return
    if output is not None:
        save_json(output, result)
    print_model(console, result)
    if output is not None:
        console.print(f"Wrote {output}")
    if any(row.get("error") not in (None, OUT_OF_MEMORY) for row in result["runs"]):
        raise typer.Exit(1)


@options.interruptible
def scaling(
    model: Annotated[str, typer.Option(help=f"An architecture with random weights: {NAMES}.")],
    height: Height = None,
    width: Width = None,
    tokens: Annotated[
        str | None, typer.Option(help="About how many video tokens, by commas; set by the number of frames.")
    ] = None,
    blocks: Annotated[int, typer.Option(help="Transformer blocks of each kind that are run; the rest is scaled.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed runs of each kind; the median counts.")] = 2,
    stock: Stock = True,
    curve: Annotated[
        str, typer.Option(help="Sparsities of the second panel, at the recipe's number of frames, by commas.")
    ] = "0,0.25,0.5,0.75,0.9,0.95",
    dtype: DtypeOption = options.Dtype.auto,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw them (.svg, .png, .pdf; needs matplotlib).")] = None,
    sparsity: Sparsities = None,
    selection: options.Selection = None,
    residual: options.Residual = None,
    tile: options.TileOption = None,
    backend: options.Backend = None,
    dense_backend: options.DenseBackend = None,
) -> None:
    """Time of a forward pass against the number of tokens, and against sparsity.

    Runs a few blocks of the model and what lies outside the blocks, and scales to all blocks.
    """
    from draftattn.cli.model_tables import print_scaling
    from draftattn.eval.comparison import save_json
    from draftattn.eval.plot_kernels import check_plot_path
    from draftattn.eval.plot_scaling import plot_scaling
    from draftattn.eval.scaling import DEFAULT_TOKENS, ScalingSettings, bench_scaling

    config = options.draft_config(
        preset_name=None,
        sparsity=None,
        warmup="0",
        selection=selection,
        residual=residual,
        tile=tile,
        dense_layers=None,
        backend=backend,
        dense_backend=dense_backend,
    )
    settings = ScalingSettings(
        tokens=DEFAULT_TOKENS if tokens is None else tuple(round(x) for x in read_shares("tokens", tokens)),
        sparsities=DEFAULT_SPARSITIES if sparsity is None else read_shares("sparsity", sparsity),
        curve=read_shares("curve", curve),
        blocks=blocks,
        repeats=repeats,
        stock=stock,
    )
    for path in (output, plot):
        if path is not None:
            check_writable(path)
    if plot is not None:
        check_plot_path(plot)
    device = options.default_device()
    console = wide_console()
    result = bench_scaling(
        model,
        height=height,
        width=width,
        config=config,
        settings=settings,
        dtype=options.resolve_dtype(dtype, device),
        device=device,
        on_progress=progress(console),
    )
    if output is not None:
        save_json(output, result)
    print_scaling(console, result)
    if output is not None:
        console.print(f"Wrote {output}")
    if plot is not None:
        plot_scaling(result, plot)
        console.print(f"Wrote {plot}")


def progress(console: Console) -> Callable[[str], None]:
    """Prints what is being done and when it began: a run takes minutes, and its output may go to a file."""
    start = time.perf_counter()

    def show(message: str) -> None:
        console.print(f"{time.perf_counter() - start:6.1f} s  {message}", highlight=False, markup=False)

    return show


def read_shares(name: str, text: str) -> tuple[float, ...]:
    """Numbers such as ``0.75,0.9``.

    Raises:
        InputError: if one is no number.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{name} is {text!r}; give numbers separated by commas") from None
