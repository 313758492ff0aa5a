"""``draftattn calibrate``: the sparsity of every layer and step for a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draftattn.cli import grid, options, run_options, tables
from draftattn.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from draftattn.eval.calibrate import Calibration
    from draftattn.schedule import SparsitySchedule

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
    measured_steps: Annotated[
        int, typer.Option(help="Denoising steps at which layers are compared, from the first sparse one on.")
    ] = 1,
    dtype: run_options.DtypeOption = options.Dtype.auto,
    offload: run_options.OffloadOption = options.Offload.none,
    markdown: tables.Markdown = False,
    preset: options.Preset = None,
    warmup: options.Warmup = None,
    growth: options.Growth = None,
    residual: options.Residual = None,
    tile: options.TileOption = None,
    dense_layers: options.DenseLayers = None,
    backend: options.Backend = None,
    dense_backend: options.DenseBackend = None,
) -> None:
    """Find the sparsity of every layer and step that meets a target of speed or quality on a few prompts.

    At the first sparse step of each prompt, every layer in turn is made sparse alone: the more the transformer's output
    changes, the larger the layer's share of the budget. Over the steps sparsity grows as --growth says. A few whole
    generations find the budget; at that budget videos are also made with all layers alike, and what is closer to the
    dense videos is written. Use the file with --schedule or DraftConfig(schedule="schedule.json").
    """
    from draftattn.eval import loading
    from draftattn.eval.calibrate import Target
    from draftattn.eval.calibrate import calibrate as run_calibration
    from draftattn.eval.environment import device_name, package_versions
    from draftattn.eval.settings import config_to_json

    aim = Target.read(target)
    config = options.draft_config(
        preset, None, warmup, None, residual, tile, dense_layers, backend, dense_backend=dense_backend, growth=growth
    )
    prompts = grid.read_prompts(prompt, prompt_file, vbench, max_prompts)
    device = options.default_device()
    weights_dtype = options.resolve_dtype(dtype, device)
    options.check_numbers(steps, guidance, 1, offload, device)
    first_step = config.num_warmup_steps(steps)
    if not 1 <= measured_steps <= steps - first_step:
        raise InputError(f"measured_steps is {measured_steps}; the run has {steps - first_step} sparse steps")
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
            pipe,
            config,
            aim,
            runs,
            num_steps=steps,
            measured_steps=measured_steps,
            on_phase=lambda what: status.update(what),
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
    console.print(_schedule_table(found.schedule, first_step, steps, device_name(device), markdown))
    console.print(_trials_table(found, markdown))
    console.print(f"Wrote {output}")


def _schedule_table(schedule: SparsitySchedule, first_step: int, num_steps: int, device: str, markdown: bool) -> Table:
    mean = schedule.mean(num_steps, first_step)
    title = f"Sparsity of the layers; mean {mean:.3f} after {first_step} dense steps; {device}"
    last = num_steps - 1
    steps = sorted({first_step + i * (last - first_step) // 4 for i in range(5)})
    table, names = tables.settings_table(
        [f"step {step + 1} of {num_steps}" for step in steps], ["least", "mean", "most"], title, markdown
    )
    for name, step in zip(names, steps, strict=True):
        shares = [schedule.at(layer, step, num_steps) for layer in range(schedule.num_layers or 1)]
        table.add_row(name, *(f"{x:.3f}" for x in (min(shares), sum(shares) / len(shares), max(shares))))
    return table


def _trials_table(found: Calibration, markdown: bool) -> Table:
    names = ["layers by need" if trial.by_layer else "layers alike" for trial in found.trials]
    headings = ["density", "speed", "PSNR dB", "chosen"]
    table, names = tables.settings_table(names, headings, "Videos made", markdown)
    for name, trial in zip(names, found.trials, strict=True):
        figures = (f"{trial.density:.3f}", f"{trial.speed:.2f}", f"{trial.psnr:.2f}")
        table.add_row(name, *figures, "yes" if trial is found.chosen else "")
    return table
