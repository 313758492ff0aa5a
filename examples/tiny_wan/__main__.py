"""Command line: ``python -m examples.tiny_wan train | evaluate | compile | card``."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from draftattn.errors import InputError

from .card import write_card
from .clips import CAPTIONS, read_scenes, read_shots
from .evaluate import SHEET_CAPTIONS, evaluate
from .loop import Budget
from .recipe import PRESETS, Recipe
from .train import compile_ahead, train, write_json

app = typer.Typer(
    help="Trains a small Wan pipeline from a folder of clips.", no_args_is_help=True, pretty_exceptions_enable=False
)

Clips = Annotated[Path, typer.Option(help="Folder of the clips that the captions file names.")]
Captions = Annotated[Path, typer.Option(help="Clips, times, captions, sources and licences.")]
Preset = Annotated[str, typer.Option(help=f"Recipe: {', '.join(PRESETS)}.")]
Device = Annotated[str, typer.Option(help="Device of torch.")]
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _recipe(preset: str) -> Recipe:
    if preset not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    return PRESETS[preset]


def _budget(minutes: float | None, iterations: int | None, default: float) -> Budget:
    return Budget(default if minutes is None and iterations is None else minutes, iterations)


@app.command("train")
def train_command(
    clips: Clips,
    run: Annotated[Path, typer.Option(help="Folder of this run; the same command continues it.")],
    captions: Captions = CAPTIONS,
    preset: Preset = "full",
    vae_minutes: Annotated[float | None, typer.Option(help="Time for the autoencoder (default 6.5).")] = None,
    transformer_minutes: Annotated[float | None, typer.Option(help="Time for the transformer (default 10.5).")] = None,
    vae_iterations: Annotated[int | None, typer.Option(help="Iterations instead of time.")] = None,
    transformer_iterations: Annotated[int | None, typer.Option(help="Iterations instead of time.")] = None,
    device: Device = DEFAULT_DEVICE,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile blocks (default: on GPUs).")
    ] = None,
) -> None:
    """Trains autoencoder and transformer and saves the pipeline to RUN/pipeline."""
    train(
        clips,
        captions,
        run,
        _recipe(preset),
        _budget(vae_minutes, vae_iterations, 6.5),
        _budget(transformer_minutes, transformer_iterations, 10.5),
        device=torch.device(device),
        compiled=device.startswith("cuda") if compiled is None else compiled,
    )


@app.command("evaluate")
def evaluate_command(
    pipeline: Annotated[Path, typer.Option(help="A saved WanPipeline: of a run, or any other.")],
    clips: Clips,
    output: Annotated[Path, typer.Option(help="JSON file for the figures.")],
    captions: Captions = CAPTIONS,
    preset: Preset = "full",
    sheet: Annotated[Path | None, typer.Option(help="JPEG for samples.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of a sample.")] = 30,
    windows: Annotated[int, typer.Option(help="Windows of each scene held out.")] = 2,
    device: Device = DEFAULT_DEVICE,
) -> None:
    """Measures a pipeline folder: reconstruction, flow loss on fixed noise, samples."""
    video = _recipe(preset).video
    place = torch.device(device)
    scenes = read_scenes(captions)
    shots = read_shots(clips, scenes, video, place)
    known = {scene.caption for scene in scenes}
    shown = [caption for caption in SHEET_CAPTIONS if caption in known] or sorted(known)[:6]
    result = evaluate(
        pipeline, shots, video, place, windows_per_shot=windows, sheet=sheet, sheet_captions=shown, steps=steps
    )
    result["pipeline"] = pipeline.name
    write_json(output, result)
    for group, values in result["reconstruction"].items():
        parts = "; ".join(
            f"{name}: {value:.2f} dB, LPIPS {values['mean']['lpips'][name]:.3f}, "
            f"colour {values['mean']['colour_error'][name]:.4f}"
            for name, value in values["mean"]["psnr"].items()
        )
        print(f"{group}: {parts}; flow loss {result['flow_loss'][group]['mean']:.4f}")
    print(f"{output} in {result['seconds']} s")


@app.command("compile")
def compile_command(preset: Preset = "full", device: Device = DEFAULT_DEVICE) -> None:
    """Fills torch's compile cache for the transformer; to be run beside the autoencoder's training."""
    compile_ahead(_recipe(preset), torch.device(device))


@app.command("card")
def card_command(
    run: Annotated[Path, typer.Option(help="Folder of a finished run.")],
    evaluation: Annotated[Path, typer.Option(help="JSON of evaluate for its pipeline.")],
    output: Annotated[Path, typer.Option(help="The card, a README.md.")],
    captions: Captions = CAPTIONS,
    against: Annotated[Path | None, typer.Option(help="JSON of evaluate for another pipeline.")] = None,
) -> None:
    """Writes the model card of a run from its figures."""
    write_card(
        output,
        json.loads((run / "run.json").read_text()),
        json.loads(evaluation.read_text()),
        json.loads(captions.read_text()),
        json.loads(against.read_text()) if against else None,
    )


if __name__ == "__main__":
    # it notes each clip that is scaled
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
    try:
        app()
    except InputError as error:
        sys.exit(f"error: {error}")
