"""``draftattn generate``: videos from prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from draftattn.cli import options, run_options
from draftattn.cli.processes import join_processes
from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.files import check_writable

if TYPE_CHECKING:
    from draftattn.eval.generation import Generation
    from draftattn.pipelines.video.stats import DraftStats

console = Console()


def generate(
    model: run_options.Model,
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Text file with one prompt a line; makes one video for each.")
    ] = None,
    negative_prompt: run_options.NegativePrompt = None,
    image: run_options.Image = None,
    height: run_options.Height = None,
    width: run_options.Width = None,
    frames: run_options.Frames = None,
    steps: run_options.Steps = 50,
    guidance: run_options.Guidance = None,
    seed: run_options.Seed = 0,
    fps: run_options.Fps = 16,
    output: Annotated[Path, typer.Option(help="The video; with several prompts a number is added to the name.")] = Path(
        "out/draft.mp4"
    ),
    against_dense: Annotated[
        bool,
        typer.Option(
            "--against-dense",
            help="Also make the dense video (dense.mp4 beside the output) and compare.json with time, density, "
            "PSNR, SSIM, LPIPS and flicker.",
        ),
    ] = False,
    dtype: run_options.DtypeOption = options.Dtype.auto,
    offload: run_options.OffloadOption = options.Offload.none,
    vae_tiling: run_options.VaeTiling = False,
    compile_blocks: run_options.CompileBlocks = False,
    context_parallel: options.ContextParallelOption = options.ContextParallel.none,
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
    growth: options.Growth = None,
    schedule: options.Schedule = None,
) -> None:
    """Generate videos with draft attention.

    Under torchrun or accelerate launch every GPU makes its share of the prompts; with --context-parallel ulysses all
    of them make each video together.
    """
    config = options.draft_config(
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
        schedule=schedule,
    )
    processes = join_processes(options.default_device())
    device, together = processes.device, context_parallel is options.ContextParallel.ulysses
    console.quiet = not processes.is_main
    weights_dtype = options.resolve_dtype(dtype, device)
    run_options.check_compile(compile_blocks, offload)
    options.check_numbers(steps, guidance, fps, offload, device)
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; it must be in [0, 2^63)")
    prompts = _read_prompts(prompt, prompt_file)
    targets = _outputs(output, len(prompts), against_dense)
    arguments = _pipeline_arguments(negative_prompt, height, width, frames, steps, guidance)
    if image is not None and not image.is_file():
        raise InputError(f"image {str(image)!r} is not a file")
    with console.status("reading the model's configuration"):
        from draftattn.eval import loading
        from draftattn.pipelines.video import enable
        from draftattn.pipelines.video.adapter import adapter_for
        from draftattn.pipelines.video.parallel import check_spread, spread_pipeline

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
        if together:
            check_spread(adapter_for(index["transformer"][1]), processes.count, device)
    for paths in targets:
        paths.check_writable()
    if image is not None:
        arguments["image"] = loading.read_image(image, width, height)

    console.print(f"Loading {model}")
    pipe = loading.load_pipeline(model, index, weights_dtype, device, offload.value)
    if vae_tiling:
        pipe.vae.enable_tiling()
    if together:
        spread_pipeline(pipe, processes.count, _num_tokens(model, index, height, width, frames))
    enable(pipe, config)
    if compile_blocks:
        loading.compile_blocks(pipe)
        console.print("Compiling the transformer's blocks in the first step, which takes a minute or so")
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
        "compiled": compile_blocks,
        "processes": processes.count if together else 1,
    }
    jobs = list(zip(prompts, targets, strict=True))
    pipe.set_progress_bar_config(disable=not processes.is_main)
    for text, paths in jobs if together else processes.share(jobs):
        call, said = {**arguments, "prompt": text}, {**settings, "prompt": text}
        _one_prompt(pipe, config, call, said, seed, fps, paths, device, writes=processes.is_main or not together)


def _num_tokens(model: str, index: dict[str, Any], height: int | None, width: int | None, frames: int | None) -> int:
    """Tokens of a video of this size, the pipeline's own where a side is None."""
    from draftattn.eval.loading import default_arguments
    from draftattn.pipelines.video.adapter import adapter_for
    from draftattn.pipelines.video.checks import component_config

    configs = (component_config(model, component) for component in ("vae", "transformer"))
    side, frame_step = adapter_for(index["transformer"][1]).size_multiples(*configs)
    size = {**default_arguments(index), **_pipeline_arguments(None, height, width, frames, 1, None)}
    return ((size["num_frames"] - 1) // frame_step + 1) * (size["height"] // side) * (size["width"] // side)


def _read_prompts(prompt: str | None, prompt_file: Path | None) -> list[str]:
    if (prompt is None) == (prompt_file is None):
        raise InputError("give either --prompt or --prompt-file")
    if prompt is not None:
        if not prompt.strip():
            raise InputError("prompt is empty; say what the video shows")
        return [prompt]
    assert prompt_file is not None
    from draftattn.eval.prompts import read_prompts

    return read_prompts(prompt_file)


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


def _one_prompt(
    pipe: Any,
    config: DraftConfig,
    arguments: dict[str, Any],
    settings: dict[str, Any],
    seed: int,
    fps: int,
    paths: _Outputs,
    device: torch.device,
    writes: bool,
) -> None:
    from draftattn.eval.comparison import compare, save_json
    from draftattn.eval.video import save_video
    from draftattn.pipelines.video import disable, enable

    console.print(f"[bold]{settings['prompt']}[/bold]", highlight=False)
    dense: Generation | None = None
    if paths.dense is not None:
        if settings["compiled"]:
            _compile_now(pipe, config, arguments)
        disable(pipe)
        dense = _run(pipe, "dense", arguments, seed)
        if writes:
            save_video(paths.dense, dense.video, fps)
        enable(pipe, config)
    draft = _run(pipe, "draft", arguments, seed)
    stats: DraftStats = pipe.draft.stats()
    if not writes:
        return
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


def _compile_now(pipe: Any, config: DraftConfig, arguments: dict[str, Any]) -> None:
    """One step of each kind, so that the times compared hold none of the compiler's."""
    from draftattn.pipelines.video import disable, enable

    _show_progress(pipe, "compiling")
    one_step = {**arguments, "num_inference_steps": 1, "output_type": "latent"}
    disable(pipe)
    pipe(**one_step)
    with enable(pipe, replace(config, warmup=0)):
        pipe(**one_step)


def _show_progress(pipe: Any, name: str) -> None:
    pipe.set_progress_bar_config(**{**getattr(pipe, "_progress_bar_config", {}), "desc": name})


def _run(pipe: Any, name: str, arguments: dict[str, Any], seed: int) -> Generation:
    from draftattn.eval.generation import generate as generate_video

    _show_progress(pipe, name)
    status = console.status(f"{name}: decoding the video")
    try:
        return generate_video(pipe, seed=seed, on_decode=status.start, **arguments)
    finally:
        status.stop()


def _print_comparison(comparison: dict[str, Any]) -> None:
    from draftattn.eval.metrics import METRICS

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
    for name, scores in quality.items():
        metric = METRICS[name]
        shown = [
            "identical" if scores[key] is None else f"{scores[key]:.3g} {metric.unit}".rstrip()
            for key in ("mean", "worst")
        ]
        better = "higher" if metric.higher_is_better else "lower"
        table.add_row(metric.title, "", shown[0], f"draft against dense, {better} is better; worst frame {shown[1]}")
    console.print(table)
