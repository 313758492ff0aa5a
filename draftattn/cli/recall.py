"""``draftattn recall``: how much of the attention the masks of settings keep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from draftattn.cli import grid, options, run_options, tables
from draftattn.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

_SHARES = ("recall", "recall_best", "recall_best_per_head", "recall_random")
_ERRORS = ("error", "error_residual", "error_best", "error_residual_best", "error_random", "error_residual_random")


def recall(
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
    layers: Annotated[str | None, typer.Option(help="Layers to look at, such as 0,5,-1. Default: all.")] = None,
    at_steps: Annotated[
        str | None, typer.Option(help="Steps to look at, such as 0,10,-1. Default: at 1/4, 1/2 and 3/4 of the run.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write all figures to this JSON file.")] = None,
    dtype: run_options.DtypeOption = options.Dtype.auto,
    offload: run_options.OffloadOption = options.Offload.none,
    json: tables.Json = False,
    markdown: tables.Markdown = False,
    preset: grid.Presets = None,
    sparsity: grid.Sparsities = None,
    selection: grid.Selections = None,
    tile: grid.Tiles = None,
    backend: options.Backend = None,
    policy: grid.Policies = None,
    means: grid.Means = None,
    draft_keys: grid.DraftKeys = None,
) -> None:
    """Measure the exact attention mass that the masks of settings keep, on one and the same dense run.

    Compares every mask with the best one of its density and with a random one, and gives the error of the attention
    output, with skipped blocks dropped and with them contributing through their means (residual).
    """
    from draftattn.eval import loading
    from draftattn.eval.comparison import save_json
    from draftattn.eval.environment import device_name, package_versions
    from draftattn.eval.recall import mean_figures
    from draftattn.eval.recall_probe import probe_run
    from draftattn.eval.settings import setting_to_json
    from draftattn.eval.study import to_line

    settings = grid.read_settings(
        preset, sparsity, None, selection, None, tile, None, backend, policy, means, draft_keys
    )
    prompts, seed_values = grid.read_prompts(prompt, prompt_file, vbench, max_prompts), grid.read_seeds(seeds)
    device = options.default_device()
    weights_dtype = options.resolve_dtype(dtype, device)
    options.check_numbers(steps, guidance, 1, offload, device)
    tables.check_output(output)
    console = tables.wide_console(stderr=json)
    size = {"height": height, "width": width, "num_frames": frames}
    with console.status("reading the model's configuration"):
        index = loading.check_generation(
            model, settings.values(), **size, has_image=image is not None, dtype=weights_dtype, device=device
        )
        num_layers = loading.num_attention_layers(model, index)
    chosen_layers = _resolved("layers", layers, num_layers)
    chosen_steps = _resolved("at-steps", at_steps, steps) or sorted({steps // 4, steps // 2, 3 * steps // 4})
    given = {**size, "guidance_scale": guidance, "negative_prompt": negative_prompt}
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if image is not None:
        arguments["image"] = loading.read_image(image, width, height)

    console.print(f"Loading {model}")
    pipe = loading.load_pipeline(model, index, weights_dtype, device, offload.value)
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measuring", total=len(prompts) * len(seed_values) * steps)
        for text in prompts:
            for seed in seed_values:
                first = len(rows)
                probe_run(
                    pipe,
                    settings,
                    seed=seed,
                    layers=chosen_layers,
                    steps=chosen_steps,
                    on_row=lambda row, text=text, seed=seed: rows.append({"prompt": text, "seed": seed, **row}),  # type: ignore[misc]
                    on_step=lambda: progress.advance(task),
                    prompt=text,
                    num_inference_steps=steps,
                    **arguments,
                )
                for row in rows[first:] if json else []:
                    typer.echo(to_line(row))
    averages = mean_figures(rows)
    if output is not None:
        content = {
            "model": model,
            **size,
            "num_steps": steps,
            "guidance": guidance,
            "negative_prompt": negative_prompt,
            "layers": chosen_layers,
            "steps": chosen_steps,
            "dtype": str(weights_dtype).removeprefix("torch."),
            "device": device_name(device),
            "versions": package_versions(),
            "settings": [setting_to_json(name, config) for name, config in settings.items()],
            "means": averages,
            "calls": rows,
        }
        save_json(output, content)
    if not json:
        console.print(_table(averages, device_name(device), markdown))
    if output is not None:
        console.print(f"Wrote {output}")


def _table(means: list[dict[str, Any]], device: str, markdown: bool) -> Table:
    headings = ["density", "recall", "best", "best per head", "random"]
    headings += ["error", "with residual", "best's error", "with residual", "random's error", "with residual"]
    title = f"Means over layers, steps and runs; best and random masks have the same density; {device}"
    table, names = tables.settings_table([entry["setting"] for entry in means], headings, title, markdown)
    for name, entry in zip(names, means, strict=True):
        table.add_row(name, f"{entry['density']:.3f}", *(f"{entry[key]:.3f}" for key in (*_SHARES, *_ERRORS)))
    return table


def _resolved(name: str, text: str | None, count: int) -> list[int] | None:
    """Numbers from 0 on, for numbers that may count from the end."""
    if text is None:
        return None
    numbers = grid.read_numbers(name, text)
    for number in numbers:
        if not -count <= number < count:
            raise InputError(f"{name} names {number}; there are 0 to {count - 1}")
    return sorted({number % count for number in numbers})
