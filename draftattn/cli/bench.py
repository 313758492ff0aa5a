"""``draftattn bench``: figures anyone can reproduce."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console

from draftattn.cli import options
from draftattn.cli.bench_model import MODEL_EXAMPLE, SCALING_EXAMPLE, model, scaling
from draftattn.cli.bench_policies import POLICIES_EXAMPLE, policies
from draftattn.errors import InputError
from draftattn.files import check_writable, written_whole

if TYPE_CHECKING:
    from draftattn.eval.kernel_shapes import KernelShape

bench_app = typer.Typer(help="Measure speed; every figure names what was measured, on what.", no_args_is_help=True)


@bench_app.callback()
def _bench() -> None:
    pass


bench_app.command(epilog=MODEL_EXAMPLE)(model)
bench_app.command(epilog=SCALING_EXAMPLE)(scaling)
bench_app.command(epilog=POLICIES_EXAMPLE)(policies)


class Blocks(str, Enum):
    """How tokens are cut into blocks."""

    whole = "whole"
    real = "real"


class Rows(str, Enum):
    """How many blocks the rows of random masks hold."""

    even = "even"
    uneven = "uneven"


@bench_app.command(
    epilog="Example: draftattn bench kernels --shape wan-1.3b-480p,hunyuan-720p --output kernels.json "
    "--plot kernels.svg"
)
@options.interruptible
def kernels(
    shape: Annotated[
        str | None,
        typer.Option(
            help="Names, by commas: wan-1.3b-480p, wan-14b-720p, hunyuan-720p, llm-32k, llm-128k, d64-32k, cpu-4k. "
            "Default: wan-1.3b-480p and hunyuan-720p on a GPU, cpu-4k on a CPU."
        ),
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Instead of a name: query heads.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Instead of a name: tokens of query and key.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="With --heads: key heads, if fewer.")] = None,
    head_dim: Annotated[int, typer.Option(help="With --heads: channels of a head.")] = 128,
    causal: Annotated[bool, typer.Option("--causal", help="With --heads: queries see no later keys.")] = False,
    densities: Annotated[str, typer.Option(help="Shares of block pairs computed, by commas.")] = "1,0.5,0.25,0.1",
    blocks: Annotated[
        Blocks, typer.Option(help="whole: 128 tokens each. real: the ragged blocks of the shape's video, and its text.")
    ] = Blocks.whole,
    rows: Annotated[
        Rows | None,
        typer.Option(help="even: every row keeps the same share. uneven: as draft maps do. Default: even if whole."),
    ] = None,
    residual: Annotated[bool, typer.Option("--residual", help="Also time our kernels with the residual.")] = False,
    backward: Annotated[bool, typer.Option("--backward", help="Also time backward passes.")] = False,
    masks: Annotated[bool, typer.Option("--masks/--no-masks", help="Time the making of masks.")] = True,
    kernel: Annotated[
        str | None, typer.Option(help="Only these, by commas: hopper, triton, cpu, flex, fa4, torch-flash.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long each kernel is timed at each density.")] = 0.3,
    dtype: Annotated[options.Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")] = (
        options.Dtype.auto
    ),
    output: Annotated[Path | None, typer.Option(help="Also write all figures to this JSON file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw speed-up against density (.svg, .png, .pdf; needs matplotlib).")
    ] = None,
) -> None:
    """Time block-sparse attention kernels against each other and against dense attention.

    First checks every kernel on a small problem of the same kind: one that errs more than twice as much as torch's own
    attention is not timed, and the command ends with code 1.
    """
    from draftattn.cli.bench_tables import print_shape
    from draftattn.eval.bench_kernels import BenchSettings, bench_kernels
    from draftattn.eval.plot_kernels import check_plot_path, plot_kernels

    device = options.default_device()
    shapes = _shapes(shape, heads, tokens, kv_heads, head_dim, causal, device)
    if blocks is Blocks.real:
        shapes = [named.with_real_blocks() for named in shapes]
    settings = BenchSettings(
        densities=_densities(densities),
        rows=(rows.value if rows is not None else "uneven" if blocks is Blocks.real else "even"),
        residual=residual,
        backward=backward,
        mask_road=masks,
        seconds=seconds,
        kernels=None if kernel is None else tuple(name.strip() for name in kernel.split(",")),
    )
    for path in (output, plot):
        if path is not None:
            check_writable(path)
    if plot is not None:
        check_plot_path(plot)
    console = Console()
    with console.status("measuring") as status:
        result = bench_kernels(shapes, settings, options.resolve_dtype(dtype, device), device, status.update)
    for measured in result["shapes"]:
        print_shape(console, measured, result["device"])
    if output is not None:
        with written_whole(output) as temporary:
            temporary.write_text(json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        console.print(f"Wrote {output}")
    if plot is not None:
        plot_kernels(result, plot)
        console.print(f"Wrote {plot}")
    if result["red"]:
        typer.echo(f"draftattn: wrong results, not timed: {', '.join(result['red'])}", err=True)
        raise typer.Exit(1)


@bench_app.command("plot")
@options.interruptible
def plot_results(
    results: Annotated[
        Path, typer.Argument(help="JSON file of 'draftattn bench kernels' or 'draftattn bench scaling'.")
    ],
    output: Annotated[Path, typer.Argument(help="Picture to write: .svg, .png or .pdf.")],
) -> None:
    """Draw the results of 'draftattn bench kernels' or 'draftattn bench scaling' again."""
    from draftattn.eval.plot_kernels import check_plot_path, plot_kernels
    from draftattn.eval.plot_scaling import plot_scaling

    check_plot_path(output)
    check_writable(output)
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
        schema = found["schema"]
    except OSError as error:
        raise InputError(f"results {str(results)!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"results {str(results)!r} are no JSON file of 'draftattn bench kernels'") from error
    if schema not in (1, 2) or (schema == 2 and "curve" not in found):
        raise InputError(
            f"results {str(results)!r} have schema {schema!r}; this version draws kernels (1) and scaling (2)"
        )
    (plot_kernels if schema == 1 else plot_scaling)(found, output)
    typer.echo(f"Wrote {output}")


def _shapes(
    names: str | None,
    heads: int | None,
    tokens: int | None,
    kv_heads: int | None,
    head_dim: int,
    causal: bool,
    device: torch.device,
) -> list[KernelShape]:
    """The shapes that the options describe.

    Raises:
        InputError: if there are none, or a GPU's on a CPU.
    """
    from draftattn.eval.kernel_shapes import KernelShape, kernel_shape

    if (heads is None) != (tokens is None):
        raise InputError("give --heads and --tokens together, or --shape")
    if heads is not None and tokens is not None:
        if names is not None:
            raise InputError("give either --shape or --heads and --tokens, not both")
        return [KernelShape("custom", heads, heads if kv_heads is None else kv_heads, tokens, head_dim, causal)]
    on_gpu = device.type == "cuda"
    if names is None:
        names = "wan-1.3b-480p,hunyuan-720p" if on_gpu else "cpu-4k"
    shapes = [kernel_shape(name.strip()) for name in names.split(",")]
    for shape in shapes:
        if not on_gpu and not shape.name.startswith("cpu-"):
            raise InputError(
                f"shape {shape.name!r} is for a GPU and torch sees none; take cpu-4k, or give --heads and --tokens"
            )
    return shapes


def _densities(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"densities is {text!r}; give shares such as 1,0.25,0.1") from None
