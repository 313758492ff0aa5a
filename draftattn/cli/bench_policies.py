"""``draftattn bench policies``: mask policies against each other."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from draftattn.cli import grid, options, run_options, tables
from draftattn.cli.processes import join_processes
from draftattn.errors import InputError
from draftattn.files import check_writable

CONTEST_PANEL = "Contest"
POLICIES_EXAMPLE = (
    "Example: draftattn bench policies --model assets/tiny-wan --prompt-file eval/results/contest-prompts.txt "
    "--height 256 --width 448 --frames 33 --steps 20 --output out/contest --plot out/contest.svg"
)


@options.interruptible
def policies(
    model: run_options.Model,
    prompt: grid.Prompt = None,
    prompt_file: grid.PromptFile = None,
    vbench: grid.VBench = None,
    max_prompts: grid.MaxPrompts = None,
    seeds: run_options.Seeds = "0",
    policies: Annotated[
        str | None,
        typer.Option(
            help="Contenders, by commas; all are compared at the times of the first one. 'published' is draft "
            "attention as in its paper, 'draft' the default, others are as published. After a name: +residual, "
            "+plain (without it), +frame or +space-time (tiles), +tokens (blocks scored by all their keys), "
            "+growth=0 (the same sparsity in all steps). Default: all.",
            rich_help_panel=CONTEST_PANEL,
        ),
    ] = None,
    densities: Annotated[
        str, typer.Option(help="Shares of scores computed, by commas.", rich_help_panel=CONTEST_PANEL)
    ] = "0.5,0.25,0.1",
    warmups: Annotated[
        str, typer.Option(help="Shares of leading dense steps, by commas.", rich_help_panel=CONTEST_PANEL)
    ] = "0,0.25",
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to match, recall and time on. Default: three.", rich_help_panel=CONTEST_PANEL),
    ] = None,
    at_steps: Annotated[
        str | None,
        typer.Option(
            help="Steps to do that at, counted from 0. Default: three after the warm-up.",
            rich_help_panel=CONTEST_PANEL,
        ),
    ] = None,
    recall_prompts: Annotated[
        int, typer.Option(help="Prompts to measure recall and error on.", rich_help_panel=CONTEST_PANEL)
    ] = 2,
    height: run_options.Height = None,
    width: run_options.Width = None,
    frames: run_options.Frames = None,
    steps: run_options.Steps = 20,
    guidance: run_options.Guidance = None,
    time_size: Annotated[
        str | None,
        typer.Option(
            help="Also time the attention of a video of this size, such as 480x832x81: at small sizes the making of "
            "masks outweighs the rest.",
            rich_help_panel=CONTEST_PANEL,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the contest; the same command continues it.")] = Path(
        "out/contest"
    ),
    plot: Annotated[
        Path | None, typer.Option(help="Also draw quality against time (.svg, .png, .pdf; needs matplotlib).")
    ] = None,
    keep_videos: Annotated[bool, typer.Option("--keep-videos", help="Also keep every video.")] = False,
    dtype: run_options.DtypeOption = options.Dtype.auto,
    tile: options.TileOption = None,
    backend: options.Backend = None,
    markdown: tables.Markdown = False,
) -> None:
    """Compare mask policies at equal density and at equal time of attention.

    Each policy is set to the densities asked for, its recall, output error and time are measured on the tensors of a
    dense run, and its videos are compared with dense ones. A stopped contest loses nothing: the same command continues.
    Under torchrun or accelerate launch the videos are shared out by prompt and seed; several processes may share a GPU.
    """
    from draftattn.eval import loading
    from draftattn.eval.contenders import DEFAULT_CONTENDERS, read_contenders
    from draftattn.eval.contest import Contest, measure_contest, spread_steps, write_contest
    from draftattn.eval.masks import spread
    from draftattn.eval.metrics import METRICS, check_metrics
    from draftattn.eval.plot_contest import plot_contest
    from draftattn.eval.plot_kernels import check_plot_path
    from draftattn.eval.run_study import Listener, run_study
    from draftattn.eval.study import Study, StudyFolder

    base = options.draft_config(None, None, None, None, None, tile, None, backend)
    contenders = read_contenders(DEFAULT_CONTENDERS if policies is None else policies, base)
    prompts = grid.read_prompts(prompt, prompt_file, vbench, max_prompts)
    processes = join_processes(options.default_device())
    device = processes.device
    weights_dtype = options.resolve_dtype(dtype, device)
    options.check_numbers(steps, guidance, 1, options.Offload.none, device)
    size: dict[str, Any] = {"height": height, "width": width, "num_frames": frames}
    index = loading.check_generation(
        model, contenders.values(), **size, has_image=False, dtype=weights_dtype, device=device
    )
    large = None if time_size is None else _size(time_size)
    if large is not None:
        sides = dict(zip(size, large, strict=True))
        loading.check_generation(model, [base], **sides, has_image=False, dtype=weights_dtype, device=device)
    defaults = loading.default_arguments(index)
    study = Study(
        model=model,
        prompts=tuple(prompts),
        seeds=tuple(grid.read_seeds(seeds)),
        settings={},
        **{name: defaults[name] if value is None else value for name, value in size.items()},
        num_steps=steps,
        guidance=defaults.get("guidance_scale") if guidance is None else guidance,
        dtype=str(weights_dtype).removeprefix("torch."),
    )
    check_metrics(METRICS, study.num_frames, study.height, study.width)
    num_layers = loading.num_attention_layers(model, index)
    shares = _shares("warmups", warmups)
    contest = Contest(
        contenders=contenders,
        densities=_shares("densities", densities),
        warmups=shares,
        study=study,
        layers=_numbers("layers", layers, num_layers) or spread(range(num_layers), 3),
        steps=_numbers("at-steps", at_steps, steps) or spread_steps(steps, shares),
        recall_prompts=recall_prompts,
        time_size=large,
    )
    check_writable(output / "contest.json")
    if plot is not None:
        check_plot_path(plot)
        check_writable(plot)
    console = tables.wide_console()
    console.quiet = not processes.is_main

    @functools.cache
    def load() -> Any:
        pipe = loading.load_pipeline(model, index, weights_dtype, device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=math.inf) as progress:
        task = progress.add_task("", total=None)
        listener = Listener(
            phase=lambda what: progress.update(task, description=what),
            step=functools.partial(progress.advance, task),
        )
        with processes.main_first():
            complete = measure_contest(contest, output, load, device, listener)
            folder = StudyFolder.open(output / "study", complete, device, first=processes.is_main)
        mine = functools.partial(processes.makes, num_prompts=len(folder.content["prompts"]))
        run_study(folder, complete, load, device, listener, keep_videos=keep_videos, mine=mine)
        processes.wait()
    if not processes.is_main:
        return
    result = write_contest(contest, output, device)
    print_contest(console, result, markdown)
    console.print(f"Wrote {output / 'contest.json'}")
    if plot is not None:
        plot_contest(result, plot)
        console.print(f"Wrote {plot}")


def print_contest(console: Console, result: dict[str, Any], markdown: bool) -> None:
    """Prints the rows at equal density and what they say at equal time."""
    for warmup in dict.fromkeys(row["warmup"] for row in result["rows"]):
        console.print(_equal_density(result, warmup, markdown))
        for time in dict.fromkeys(entry["time"] for entry in result["equal_time"]):
            entries = [x for x in result["equal_time"] if x["warmup"] == warmup and x["time"] == time]
            for metric in ("psnr", "lpips"):
                if metric in entries[0]:
                    console.print(_equal_time(result, entries, metric, markdown))


def _equal_density(result: dict[str, Any], warmup: float, markdown: bool) -> Table:
    rows = [row for row in result["rows"] if row["warmup"] == warmup]
    metrics = [name for name in ("psnr", "ssim", "lpips", "flicker") if name in rows[0]]
    times = [name for name in ("seconds", "large_seconds") if name in rows[0]]
    dense = ", ".join(f"{1e3 * result[f'dense_{name}']:.3g} ms at {_size_of(result, name)}" for name in times)
    table = _table(f"Equal density, warm-up {warmup:g}; dense attention takes {dense}", markdown)
    for heading in ("density", "recall", "error", *(f"ms at {_size_of(result, name)}" for name in times), *metrics):
        table.add_column(heading, justify="right")
    for target in dict.fromkeys(row["target_density"] for row in rows):
        for row in (row for row in rows if row["target_density"] == target):
            figures = [f"{row[key]:.3f}" for key in ("density", "recall", "error")]
            figures += [f"{1e3 * row[name]:.3g}" for name in times]
            table.add_row(row["contender"], *figures, *(_shown(row[name]) for name in metrics))
        table.add_section()
    return table


def _equal_time(result: dict[str, Any], entries: list[dict[str, Any]], metric: str, markdown: bool) -> Table:
    first = entries[0]
    size = _size_of(result, first["time"])
    table = _table(f"{metric} within the time of {first['reference']} at {size}, warm-up {first['warmup']:g}", markdown)
    seconds = {entry["target_density"]: entry["seconds"] for entry in entries}
    for target, of_reference in seconds.items():
        table.add_column(f"density {target:g}: {1e3 * of_reference:.3g} ms", justify="right")
    for contender in dict.fromkeys(entry["contender"] for entry in entries):
        found = {entry["target_density"]: entry[metric] for entry in entries if entry["contender"] == contender}
        table.add_row(contender, *("slower" if found[x] is None else f"{found[x]:.3g}" for x in seconds))
    return table


def _table(title: str, markdown: bool) -> Table:
    table = Table(title=title, title_justify="left", box=box.MARKDOWN if markdown else box.SIMPLE)
    table.add_column("policy")
    return table


def _size_of(result: dict[str, Any], time: str) -> str:
    """The size of the videos that a time is of."""
    own = [result[side] for side in ("height", "width", "num_frames")]
    return "×".join(map(str, own if time == "seconds" else result["time_size"]))


def _size(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)[x×](\d+)", text.strip())
    if match is None:
        raise InputError(f"time-size is {text!r}; give height×width×frames such as 480x832x81")
    height, width, frames = (int(side) for side in match.groups())
    return height, width, frames


def _shown(value: float | None) -> str:
    return "identical" if value is None else f"{value:.3g}"


def _shares(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise InputError(f"{name} is {text!r}; give shares such as 0.5,0.25") from None


def _numbers(name: str, text: str | None, count: int) -> tuple[int, ...] | None:
    if text is None:
        return None
    numbers = grid.read_numbers(name, text)
    for number in numbers:
        if not -count <= number < count:
            raise InputError(f"{name} names {number}; there are 0 to {count - 1}")
    return tuple(sorted({number % count for number in numbers}))
