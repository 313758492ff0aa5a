"""``draftattn masks``: pictures of what attention keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from draftattn.cli import options, run_options
from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.files import check_writable
from draftattn.policies import policy_text

MASK_PANEL = "What to draw"


def masks(
    model: run_options.Model,
    prompt: Annotated[str, typer.Option(help="What the video shows.")],
    layers: Annotated[
        str | None,
        typer.Option(help="Layers, counted from 0, such as 0,5,11. Default: three.", rich_help_panel=MASK_PANEL),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="Heads, counted from 0, such as 0,1. Default: three.", rich_help_panel=MASK_PANEL),
    ] = None,
    at_steps: Annotated[
        str | None,
        typer.Option(
            help="Denoising steps, counted from 1, such as 4,12. Default: three after the warm-up.",
            rich_help_panel=MASK_PANEL,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the page, the GIF and the pictures.")] = Path("out/masks"),
    negative_prompt: run_options.NegativePrompt = None,
    image: run_options.Image = None,
    height: run_options.Height = None,
    width: run_options.Width = None,
    frames: run_options.Frames = None,
    steps: run_options.Steps = 50,
    guidance: run_options.Guidance = None,
    seed: run_options.Seed = 0,
    dtype: run_options.DtypeOption = options.Dtype.auto,
    offload: run_options.OffloadOption = options.Offload.none,
    vae_tiling: run_options.VaeTiling = False,
    preset: options.Preset = None,
    sparsity: options.Sparsity = None,
    warmup: options.Warmup = None,
    selection: options.Selection = None,
    residual: options.Residual = None,
    tile: options.TileOption = None,
    dense_layers: options.DenseLayers = None,
    backend: options.Backend = None,
    dense_backend: options.DenseBackend = None,
    policy: options.Policy = None,
) -> None:
    """Draw the draft map and the block mask of chosen layers, heads and steps.

    Generates a video, records what attention chose on the way (which changes nothing in the result), and writes a
    page on which you pick a tile of the video and see where it looks, a GIF, and a PNG of every map.
    """
    from draftattn.eval import loading
    from draftattn.eval.mask_page import write_masks

    config = options.draft_config(
        preset, sparsity, warmup, selection, residual, tile, dense_layers, backend, policy, dense_backend=dense_backend
    )
    device = options.default_device()
    weights_dtype = options.resolve_dtype(dtype, device)
    options.check_numbers(steps, guidance, 1, offload, device)
    if not prompt.strip():
        raise InputError("prompt is empty; say what the video shows")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; it must be in [0, 2^63)")
    console = Console()
    with console.status("reading the model's configuration"):
        index = loading.check_generation(
            model,
            [config],
            height=height,
            width=width,
            num_frames=frames,
            has_image=image is not None,
            dtype=weights_dtype,
            device=device,
        )
        chosen = _what_to_record(model, index, config, steps, layers, heads, at_steps)
    check_writable(output / "masks.html")
    given = {
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_frames": frames,
        "guidance_scale": guidance,
        "image": None if image is None else loading.read_image(image, width, height),
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    console.print(f"Loading {model}")
    pipe = loading.load_pipeline(model, index, weights_dtype, device, offload.value)
    if vae_tiling:
        pipe.vae.enable_tiling()
    records, video = _generate(pipe, config, chosen, seed, prompt=prompt, num_inference_steps=steps, **arguments)
    facts = {
        "Model": model,
        "Size": f"{video.shape[3]}×{video.shape[2]} pixels, {video.shape[0]} frames",
        "Denoising steps": steps,
        "Seed": seed,
        "Sparsity": f"{config.sparsity * 100:g} %",
        "Selection": f"per {config.selection}" if config.policy == "draft" else policy_text(config.policy),
        "Warm-up": f"{config.num_warmup_steps(steps)} of {steps} steps",
        "Tile": "×".join(map(str, records[0].layout.tile)) + " tokens",
    }
    with console.status("drawing"):
        written = write_masks(output, records, video, facts, prompt)
    console.print(f"Wrote {written.page}, {written.animation} and {len(written.pictures)} pictures beside them")


def _what_to_record(
    model: str,
    index: dict[str, Any],
    config: DraftConfig,
    num_steps: int,
    layers: str | None,
    heads: str | None,
    at_steps: str | None,
) -> dict[str, tuple[int, ...]]:
    """The layers, heads and steps asked for, or a few of each."""
    from draftattn.eval.masks import check_numbers, spread
    from draftattn.pipelines.video.adapter import adapter_for, resolve_layers
    from draftattn.pipelines.video.checks import component_config

    transformer = component_config(model, "transformer")
    num_layers = adapter_for(index["transformer"][1]).num_layers(transformer)
    dense = resolve_layers(config.dense_layers, num_layers)
    warmup = config.num_warmup_steps(num_steps)
    allowed = {
        "layers": [layer for layer in range(num_layers) if layer not in dense],
        "heads": list(range(transformer["num_attention_heads"])),
        "at-steps": list(range(warmup + 1, num_steps + 1)),
    }
    reasons = {
        "layers": f"the model has {num_layers} layers, {_number_word(len(dense))} of them dense",
        "heads": f"the model has {transformer['num_attention_heads']} heads",
        "at-steps": f"the first {warmup} of {num_steps} steps are dense",
    }
    texts = {"layers": layers, "heads": heads, "at-steps": at_steps}
    found = {
        name: check_numbers(
            name,
            spread(allowed[name], 3) if given is None else _read_numbers(name, given),
            allowed[name],
            reasons[name],
        )
        for name, given in texts.items()
    }
    return {**found, "at-steps": tuple(step - 1 for step in found["at-steps"])}


def _generate(
    pipe: Any, config: DraftConfig, chosen: dict[str, tuple[int, ...]], seed: int, **arguments: Any
) -> tuple[list[Any], Any]:
    """Makes the video and gives what was recorded on the way."""
    from draftattn.eval.generation import generate
    from draftattn.eval.masks import RecordingPolicy
    from draftattn.pipelines.video import enable
    from draftattn.policies import make_policy

    recorder = RecordingPolicy(make_policy(config), chosen["layers"], chosen["at-steps"], chosen["heads"])
    with enable(pipe, config, policy=recorder):
        generation = generate(pipe, seed=seed, **arguments)
    return recorder.records, generation.video


def _read_numbers(name: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise InputError(f"{name} is {text!r}; give numbers such as 0,1,5") from None


def _number_word(number: int) -> str:
    return {0: "none", 1: "one"}.get(number, str(number))
