"""``draftattn generate``: videos from prompts."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from draftattn.cli import options
from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.files import check_writable

if TYPE_CHECKING:
    from draftattn.eval.generation import Generation
    from draftattn.pipelines.video.stats import DraftStats

console = Console()


class Offload(str, Enum):
    """Where weights wait when they are not in use."""

    none = "none"
    model = "model"
    sequential = "sequential"


def generate(
    model: Annotated[str, typer.Option(help="Folder in diffusers' layout, or Hugging Face repository id.")],
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Text file with one prompt a line; makes one video for each.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, for image-to-video models.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: the pipeline's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: the pipeline's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames. Default: the pipeline's.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    fps: Annotated[int, typer.Option(help="Frames per second of the file.")] = 16,
    output: Annotated[Path, typer.Option(help="The video; with several prompts a number is added to the name.")] = Path(
        "out/draft.mp4"
    ),
    against_dense: Annotated[
        bool,
        typer.Option(
            "--against-dense",
            help="Also make the dense video (dense.mp4 beside the output) and compare.json with time, density, "
            "PSNR and SSIM.",
        ),
    ] = False,
    dtype: Annotated[options.Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")] = (
        options.Dtype.auto
    ),
    offload: Annotated[
        Offload, typer.Option(help="Keep weights on the CPU: by whole models, or by layers (slower, least memory).")
    ] = Offload.none,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles, for less memory.")] = False,
    preset: options.Preset = None,
    sparsity: options.Sparsity = None,
    warmup: options.Warmup = None,
    selection: options.Selection = None,
    residual: options.Residual = None,
    tile: options.TileOption = None,
    dense_layers: options.DenseLayers = None,
    backend: options.Backend = None,
) -> None:
    """Generate videos with draft attention."""
    config = options.draft_config(preset, sparsity, warmup, selection, residual, tile, dense_layers, backend)
    device = options.default_device()
    weights_dtype = options.resolve_dtype(dtype, device)
    _check_numbers(steps, guidance, fps, seed, offload, device)
    prompts = _read_prompts(prompt, prompt_file)
    targets = _outputs(output, len(prompts), against_dense)
    arguments = _pipeline_arguments(negative_prompt, height, width, frames, steps, guidance)
    index = _check_model(model, config, image, height, width, frames, weights_dtype, device)
    for paths in targets:
        paths.check_writable()
    if image is not None:
        arguments["image"] = _read_image(image, width, height)

    pipe = _load(model, index, config, weights_dtype, device, offload, vae_tiling)
    settings = {
        "model": model,
        "negative_prompt": negative_prompt,
        "image": None if image is None else str(image),
        "height": height,
        "width": width,
        "frames": frames,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "dtype": str(weights_dtype).removeprefix("torch."),
        "offload": offload.value,
    }
    for text, paths in zip(prompts, targets, strict=True):
        _one_prompt(pipe, config, {**arguments, "prompt": text}, {**settings, "prompt": text}, seed, fps, paths, device)


def _check_numbers(
    steps: int, guidance: float | None, fps: int, seed: int, offload: Offload, device: torch.device
) -> None:
    if steps < 1:
        raise InputError(f"steps is {steps}; it must be at least 1")
    if guidance is not None and guidance < 0:
        raise InputError(f"guidance is {guidance}; it must not be negative")
    if fps < 1:
        raise InputError(f"fps is {fps}; it must be at least 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; it must be in [0, 2^63)")
    if offload is not Offload.none and device.type == "cpu":
        raise InputError(f"offload is {offload.value!r}; without a GPU there is nothing to offload from, use none")


def _read_prompts(prompt: str | None, prompt_file: Path | None) -> list[str]:
    if (prompt is None) == (prompt_file is None):
        raise InputError("give either --prompt or --prompt-file")
    if prompt is not None:
        if not prompt.strip():
            raise InputError("prompt is empty; say what the video shows")
        return [prompt]
    assert prompt_file is not None
    try:
        lines = [line.strip() for line in prompt_file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt file {str(prompt_file)!r} cannot be read: {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise InputError(f"prompt file {str(prompt_file)!r} holds no prompt; write one a line")
    return prompts


class _Outputs:
    """The files one prompt leaves."""

    def __init__(self, draft: Path, against_dense: bool, number: int | None) -> None:
        suffix = "" if number is None else f"-{number:03d}"
        self.draft = draft.with_name(f"{draft.stem}{suffix}{draft.suffix}")
        self.dense = draft.with_name(f"dense{suffix}.mp4") if against_dense else None
        self.comparison = draft.with_name(f"compare{suffix}.json") if against_dense else None

    def check_writable(self) -> None:
        """Raises an InputError if one of the files could not be written."""
        for path in (self.draft, self.dense, self.comparison):
            if path is not None:
                check_writable(path)


def _outputs(output: Path, count: int, against_dense: bool) -> list[_Outputs]:
    if output.suffix != ".mp4":
        raise InputError(f"output is {str(output)!r}; it must end in .mp4")
    if against_dense and output.stem == "dense":
        raise InputError(f"output is {str(output)!r}; with --against-dense that name is the dense video's")
    return [_Outputs(output, against_dense, None if count == 1 else number) for number in range(count)]


def _pipeline_arguments(
    negative_prompt: str | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    steps: int,
    guidance: float | None,
) -> dict[str, Any]:
    given = {
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    return {name: value for name, value in given.items() if value is not None}


def _check_model(
    model: str,
    config: DraftConfig,
    image: Path | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    if image is not None and not image.is_file():
        raise InputError(f"image {str(image)!r} is not a file")
    with console.status("reading the model's configuration"):
        from draftattn.pipelines.video.checks import check_backend, check_request, component_config
        from draftattn.pipelines.video.pipeline import check_model

        index = check_model(model)
        needs_image = "ImageToVideo" in index["_class_name"]
        if needs_image != (image is not None):
            wants = "needs --image, its first frame" if needs_image else "takes no --image"
            raise InputError(f"{index['_class_name']} {wants}")
        check_request(model, index, config, height=height, width=width, num_frames=frames)
        check_backend(config, component_config(model, "transformer"), dtype, device)
    return index


def _read_image(path: Path, width: int | None, height: int | None) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"image {str(path)!r} cannot be read: {error}") from error
    return image if width is None or height is None else image.resize((width, height))


def _load(
    model: str,
    index: dict[str, Any],
    config: DraftConfig,
    dtype: torch.dtype,
    device: torch.device,
    offload: Offload,
    vae_tiling: bool,
) -> Any:
    from draftattn.pipelines.video.adapter import adapter_for
    from draftattn.pipelines.video.pipeline import DraftAttentionPipeline

    vae_dtype = torch.float32 if adapter_for(index["transformer"][1]).vae_in_float32 else dtype
    console.print(f"Loading {model}")
    pipe: Any = DraftAttentionPipeline.from_pretrained(model, draft=config, dtype={"default": dtype, "vae": vae_dtype})
    if offload is Offload.model:
        pipe.enable_model_cpu_offload()
    elif offload is Offload.sequential:
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.to(device)
    if vae_tiling:
        pipe.vae.enable_tiling()
    return pipe


def _one_prompt(
    pipe: Any,
    config: DraftConfig,
    arguments: dict[str, Any],
    settings: dict[str, Any],
    seed: int,
    fps: int,
    paths: _Outputs,
    device: torch.device,
) -> None:
    from draftattn.eval.comparison import compare, save_json
    from draftattn.eval.video import save_video
    from draftattn.pipelines.video import disable, enable

    console.print(f"[bold]{settings['prompt']}[/bold]", highlight=False)
    dense: Generation | None = None
    if paths.dense is not None:
        disable(pipe)
        dense = _run(pipe, "dense", arguments, seed)
        save_video(paths.dense, dense.video, fps)
        enable(pipe, config)
    draft = _run(pipe, "draft", arguments, seed)
    stats: DraftStats = pipe.draft.stats()
    save_video(paths.draft, draft.video, fps)
    if dense is None:
        console.print(f"{paths.draft}: {draft.seconds:.1f} s, density of sparse layers {stats.density:.3f}")
        return
    assert paths.comparison is not None
    with console.status("comparing the videos"):
        comparison = compare(dense, draft, stats, config, settings, device)
    save_json(paths.comparison, comparison)
    _print_comparison(comparison)
    console.print(f"Wrote {paths.dense}, {paths.draft} and {paths.comparison}")


def _run(pipe: Any, name: str, arguments: dict[str, Any], seed: int) -> Generation:
    from draftattn.eval.generation import generate as generate_video

    pipe.set_progress_bar_config(desc=name)
    status = console.status(f"{name}: decoding the video")
    try:
        return generate_video(pipe, seed=seed, on_decode=status.start, **arguments)
    finally:
        status.stop()


def _print_comparison(comparison: dict[str, Any]) -> None:
    dense, draft, quality = comparison["dense"], comparison["draft"], comparison["quality"]
    speedup = comparison["speedup"]
    table = Table("", "dense", "draft", "", title=comparison["device"], title_justify="left")
    for name, key, digits in (("one step", "step", 3), ("whole run", "run", 1)):
        seconds = "step_seconds" if key == "step" else "seconds"
        table.add_row(
            name,
            f"{dense[seconds]:.{digits}f} s",
            f"{draft[seconds]:.{digits}f} s",
            f"speed-up {speedup[key]:.2f}×",
        )
    table.add_row("warm-up", "", f"{draft['warmup_steps']}", "leading steps of the draft run that are dense")
    table.add_row("density", "1", f"{draft['density']:.3f}", "share of scores computed in sparse layers")
    for name, unit in (("psnr", " dB"), ("ssim", "")):
        mean, worst = quality[name]["mean"], quality[name]["worst"]
        shown = ["identical" if value is None else f"{value:.3g}{unit}" for value in (mean, worst)]
        table.add_row(name.upper(), "", shown[0], f"draft against dense; worst frame {shown[1]}")
    console.print(table)
