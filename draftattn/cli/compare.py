"""``draftattn compare``: what settings do to your prompts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from draftattn.cli import grid, options, run_options, tables
from draftattn.cli.processes import join_processes
from draftattn.files import check_writable

if TYPE_CHECKING:
    from draftattn.eval.run_study import Listener
    from draftattn.eval.study import Run, Study, StudyFolder


def compare(
    model: run_options.Model,
    prompt: grid.Prompt = None,
    prompt_file: grid.PromptFile = None,
    vbench: grid.VBench = None,
    max_prompts: grid.MaxPrompts = None,
    seeds: run_options.Seeds = "0",
    negative_prompt: run_options.NegativePrompt = None,
    image: run_options.Image = None,
    height: run_options.Height = None,
    width: run_options.Width = None,
    frames: run_options.Frames = None,
    steps: run_options.Steps = 50,
    guidance: run_options.Guidance = None,
    fps: run_options.Fps = 16,
    output: Annotated[Path, typer.Option(help="Folder of the study; the same command continues it.")] = Path(
        "out/study"
    ),
    dtype: run_options.DtypeOption = options.Dtype.auto,
    offload: run_options.OffloadOption = options.Offload.none,
    vae_tiling: run_options.VaeTiling = False,
    compile_blocks: run_options.CompileBlocks = False,
    json: tables.Json = False,
    markdown: tables.Markdown = False,
    preset: grid.Presets = None,
    sparsity: grid.Sparsities = None,
    warmup: grid.Warmups = None,
    growth: grid.Growths = None,
    selection: grid.Selections = None,
    residual: grid.Residuals = None,
    tile: grid.Tiles = None,
    dense_layers: options.DenseLayers = None,
    backend: options.Backend = None,
    dense_backend: options.DenseBackend = None,
    policy: grid.Policies = None,
    means: grid.Means = None,
    draft_keys: grid.DraftKeys = None,
) -> None:
    """Compare settings with dense attention, on many prompts and seeds.

    Makes the dense video of each prompt and seed once and one video for every setting, measures time, density, PSNR,
    SSIM, LPIPS and flicker, and writes report.html. A stopped run loses nothing: the same command continues it.
    Under torchrun or accelerate launch every GPU takes its share of prompts and seeds.
    """
    from draftattn.eval import loading
    from draftattn.eval.metrics import METRICS, check_metrics
    from draftattn.eval.report import write_report
    from draftattn.eval.run_study import run_study
    from draftattn.eval.study import Study, StudyFolder

    settings = grid.read_settings(
        preset,
        sparsity=sparsity,
        warmup=warmup,
        growth=growth,
        selection=selection,
        residual=residual,
        tile=tile,
        dense_layers=dense_layers,
        backend=backend,
        dense_backend=dense_backend,
        policy=policy,
        means=means,
        draft_keys=draft_keys,
    )
    prompts = grid.read_prompts(prompt, prompt_file, vbench, max_prompts)
    processes = join_processes(options.default_device())
    device = processes.device
    weights_dtype = options.resolve_dtype(dtype, device)
    run_options.check_compile(compile_blocks, offload)
    options.check_numbers(steps, guidance, fps, offload, device)
    console = tables.wide_console(stderr=json)
    console.quiet = not processes.is_main
    with console.status("reading the model's configuration"):
        size = {"height": height, "width": width, "num_frames": frames}
        index = loading.check_generation(
            model, settings.values(), **size, has_image=image is not None, dtype=weights_dtype, device=device
        )
        defaults = loading.default_arguments(index)
    study = Study(
        model=model,
        prompts=tuple(prompts),
        seeds=tuple(grid.read_seeds(seeds)),
        settings=settings,
        **{name: defaults[name] if value is None else value for name, value in size.items()},
        num_steps=steps,
        guidance=defaults.get("guidance_scale") if guidance is None else guidance,
        dtype=str(weights_dtype).removeprefix("torch."),
        negative_prompt=negative_prompt,
        image=None if image is None else str(image),
        fps=fps,
        compiled=compile_blocks,
    )
    check_metrics(METRICS, study.num_frames, study.height, study.width)
    if image is not None:
        loading.read_image(image, None, None)
    check_writable(output / "study.json")
    with processes.main_first():
        folder = StudyFolder.open(output, study, device, first=processes.is_main)

    mine = functools.partial(processes.makes, num_prompts=len(folder.content["prompts"]))

    def load() -> Any:
        pipe = loading.load_pipeline(model, index, weights_dtype, device, offload.value)
        if vae_tiling:
            pipe.vae.enable_tiling()
        if compile_blocks:
            loading.compile_blocks(pipe)
        return pipe

    try:
        with _listener(console, folder, study, json and processes.is_main, mine) as listener:
            run_study(folder, study, load, device, listener, mine=mine)
            processes.wait()
            if not processes.is_main:
                return
            for row in folder.rows_of(study):
                listener.result(row)
        folder.write_results()
        with console.status("writing the report"):
            report = write_report(output)
    except KeyboardInterrupt:
        typer.echo("draftattn: interrupted; what is complete is kept, the same command continues", err=True)
        raise typer.Exit(130) from None
    if not json:
        console.print(_table(folder.rows_of(study), folder.content["device"], markdown))
    console.print(f"Wrote {report}")


@contextmanager
def _listener(
    console: Console, folder: StudyFolder, study: Study, json: bool, mine: Callable[[Run], bool]
) -> Iterator[Listener]:
    """Shows steps done and time left for this process's part of the study, and every line once."""
    from draftattn.eval.run_study import Listener
    from draftattn.eval.study import to_line

    runs, missing = folder.runs_of(study), folder.outstanding(study)
    outstanding = sum(map(mine, missing))
    shown: set[tuple[str, int, int]] = set()

    def show(row: dict[str, Any]) -> None:
        name = row["setting"], row["prompt"], row["seed"]
        if json and name not in shown:
            typer.echo(to_line(row))
        shown.add(name)

    if len(missing) < len(runs):
        console.print(f"{len(runs) - len(missing)} of {len(runs)} videos are there already")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # videos take from seconds to an hour: the speed is that of all steps so far, decoding included
    with Progress(*columns, console=console, speed_estimate_period=math.inf, disable=not outstanding) as progress:
        for row in folder.rows_of(study):
            show(row)
        task = progress.add_task("", total=outstanding * study.num_steps)
        yield Listener(
            phase=lambda what: progress.update(task, description=what),
            step=functools.partial(progress.advance, task),
            result=show,
        )


def _table(rows: list[dict[str, Any]], device: str, markdown: bool) -> Table:
    from draftattn.eval.metrics import METRICS
    from draftattn.eval.summary import summarise

    entries = summarise(rows)
    headings = ["videos", "density", "step", "step ×", "run ×"]
    headings += [f"{metric.title} {metric.unit}".strip() for metric in METRICS.values()]
    title = f"Means over videos, the worst frame of all in brackets; {device}"
    table, names = tables.settings_table([entry["setting"] for entry in entries], headings, title, markdown)
    for name, entry in zip(names, entries, strict=True):
        table.add_row(
            name,
            str(entry["videos"]),
            f"{entry['density']:.3f}",
            f"{entry['step_seconds']:.3g} s",
            f"{entry['speedup']:.2f}",
            f"{entry['run_speedup']:.2f}",
            *(f"{tables.shown(entry[metric])} ({tables.shown(entry[f'{metric}_worst'])})" for metric in METRICS),
        )
    return table
