"""``draftattn calibrate``: the sparsity of every layer and range of steps for a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draftattn.cli import grid, options, run_options, tables
from draftattn.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from draftattn.eval.calibrate import Calibration

CALIBRATE_EXAMPLE = (
    "Example: draftattn calibrate --model assets/tiny-wan --prompt-file prompts.txt --height 256 --width 448 "
    '--frames 33 --steps 20 --target "psnr 24" --output out/schedule.json'
)


@options.interruptible
def calibrate(
    model: run_options.Model,
    target: Annotated[
        str, typer.Option(help="What to reach: 'speed 2x' (denoising), 'psnr 30' (dB against dense), 'sparsity 0.8'.")
    ],
    output: Annotated[Path, typer.Option(help="The schedule, a JSON file that --schedule and DraftConfig take.")],
    prompt: grid.Prompt = None,
    prompt_file: grid.PromptFile = None,
    vbench: grid.VBench = None,
    max_prompts: grid.MaxPrompts = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", rich_help_panel=grid.PROMPT_PANEL)] = 0,
    negative_prompt: run_options.NegativePrompt = None,
    image: run_options.Image = None,
    height: run_options.Height = None,
    width: run_options.Width = None,
    frames: run_options.Frames = None,
    steps: run_options.Steps = 50,
    guidance: run_options.Guidance = None,
    ranges: Annotated[int, typer.Option(help="Ranges of steps with a sparsity of their own.")] = 3,
    dtype: run_options.DtypeOption = options.Dtype.auto,
    offload: run_options.OffloadOption = options.Offload.none,
    markdown: tables.Markdown = False,
    preset: options.Preset = None,
    warmup: options.Warmup = None,
    residual: options.Residual = None,
    tile: options.TileOption = None,
    dense_layers: options.DenseLayers = None,
    backend: options.Backend = None,
    dense_backend: options.DenseBackend = None,
) -> None:
    """Find the sparsity of every layer and range of steps that meets a target of speed or quality on a few prompts.

    One dense run per prompt measures how much error each layer makes at each sparsity; a budget is shared by that, and
    a few whole generations find the budget. Use the file with DraftConfig(schedule="schedule.json").
    """
    from draftattn.eval import loading
    from draftattn.eval.calibrate import Target
    from draftattn.eval.calibrate import calibrate as run_calibration
    from draftattn.eval.environment import device_name, package_versions
    from draftattn.eval.settings import config_to_json

    aim = Target.read(target)
    config = options.draft_config(
        preset, None, warmup, None, residual, tile, dense_layers, backend, dense_backend=dense_backend
    )
    prompts = grid.read_prompts(prompt, prompt_file, vbench, max_prompts)
    device = options.default_device()
    weights_dtype = options.resolve_dtype(dtype, device)
    options.check_numbers(steps, guidance, 1, offload, device)
    if not 1 <= ranges <= steps - config.num_warmup_steps(steps):
        raise InputError(f"ranges is {ranges}; the run has {steps - config.num_warmup_steps(steps)} sparse steps")
    tables.check_output(output)
    size = {"height": height, "width": width, "num_frames": frames}
    index = loading.check_generation(
        model, [config], **size, has_image=image is not None, dtype=weights_dtype, device=device
    )
    given = {**size, "guidance_scale": guidance, "negative_prompt": negative_prompt}
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if image is not None:
        arguments["image"] = loading.read_image(image, width, height)
    console = tables.wide_console()
    console.print(f"Loading {model}")
    pipe = loading.load_pipeline(model, index, weights_dtype, device, offload.value)
    pipe.set_progress_bar_config(disable=True)
    runs = [{"prompt": text, "seed": seed, **arguments} for text in prompts]
    with console.status("starting") as status:
        found = run_calibration(
            pipe, config, aim, runs, num_steps=steps, num_ranges=ranges, on_phase=lambda what: status.update(what)
        )
    found.schedule.save(
        output,
        {
            "model": model,
            "target": target,
            "prompts": prompts,
            "seed": seed,
            **size,
            "num_steps": steps,
            "guidance": guidance,
            "dtype": str(weights_dtype).removeprefix("torch."),
            "device": device_name(device),
            "versions": package_versions(),
            "settings": config_to_json(config),
            **found.to_json(),
        },
    )
    console.print(_table(found, device_name(device), markdown))
    if found.chosen is not None:
        console.print(f"Speed {found.chosen.speed:.2f}, PSNR {found.chosen.psnr:.1f} dB at the density chosen")
    console.print(f"Wrote {output}")


def _table(found: Calibration, device: str, markdown: bool) -> Table:
    schedule = found.schedule
    title = f"Sparsity by range of steps; mean {schedule_mean(found):.3f} after the warm-up; {device}"
    names = [f"to {end:.0%} of the steps" for end in schedule.steps]
    table, names = tables.settings_table(names, ["least", "mean", "most"], title, markdown)
    for name, row in zip(names, schedule.sparsity, strict=True):
        shares = row if isinstance(row, tuple) else (row,)
        table.add_row(name, *(f"{x:.3f}" for x in (min(shares), sum(shares) / len(shares), max(shares))))
    return table


def schedule_mean(found: Calibration) -> float:
    """Mean sparsity of the steps that can be sparse."""
    schedule, first = found.schedule, found.sensitivity.first
    starts = (first, *schedule.steps[:-1])
    rows = [row if isinstance(row, tuple) else (row,) for row in schedule.sparsity]
    total = sum(
        (end - start) * sum(row) / len(row) for start, end, row in zip(starts, schedule.steps, rows, strict=True)
    )
    return total / (1 - first)
