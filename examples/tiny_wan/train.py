"""The whole training: clips, autoencoder, latents, transformer, pipeline folder. Each stage continues where it was."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from draftattn.errors import InputError
from draftattn.files import written_whole

from .autoencoder import build_autoencoder, train_autoencoder
from .clips import draw_windows, read_scenes, read_shots
from .latents import Latents, encode_windows
from .loop import Budget
from .pipeline_folder import assemble, folder_size, save_pipeline
from .recipe import Recipe
from .state import TrainingState
from .text import embed_captions
from .transformer import TransformerTrainer, build_transformer, train_transformer


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def train(
    clips: Path,
    captions: Path,
    run: Path,
    recipe: Recipe,
    autoencoder_budget: Budget,
    transformer_budget: Budget,
    *,
    device: torch.device,
    compiled: bool,
) -> Path:
    """Trains a pipeline and saves it to ``run / "pipeline"``; call again with the same arguments to continue.

    Args:
        clips: folder of the clips.
        captions: file that names clips, times and captions, as ``clips.json``.
        run: folder of this run: states, latents, the pipeline, ``run.json``.
        recipe: what is trained and how.
        autoencoder_budget: for the autoencoder.
        transformer_budget: for the transformer.
        device: where it is trained.
        compiled: compiles the networks' blocks.

    Raises:
        InputError: if clips are missing or the run folder belongs to another recipe.
    """
    if compiled:
        # one entry for each size of crops and of windows
        torch._dynamo.config.recompile_limit = 64
    run.mkdir(parents=True, exist_ok=True)
    _claim(run / "recipe.json", recipe)
    clock = _Clock(run / "stages.json")
    vae_state, latents_file, transformer_state = (
        run / name for name in ("autoencoder.safetensors", "latents.safetensors", "transformer.safetensors")
    )
    shots = read_shots(clips, read_scenes(captions), recipe.video, device)
    clock.lap("clips")
    print(f"clips: {len(shots)} scenes, {sum(len(shot.frames) for shot in shots):,} frames", flush=True)

    torch.manual_seed(recipe.seed)
    vae = build_autoencoder(recipe.autoencoder).to(device)
    vae_done = train_autoencoder(
        vae, shots, recipe.autoencoder, autoencoder_budget, vae_state, seed=recipe.seed, compiled=compiled
    )
    clock.lap("autoencoder")

    if latents_file.exists():
        latents = Latents.load(latents_file, device)
    else:
        windows = draw_windows(shots, recipe.video, torch.Generator().manual_seed(recipe.seed))
        latents = encode_windows(vae, shots, windows, recipe.video)
        latents.save(latents_file)
    vae.register_to_config(latents_mean=list(latents.mean), latents_std=list(latents.std))
    clock.lap("latents")

    torch.manual_seed(recipe.seed)
    transformer = build_transformer(recipe.transformer).to(device)
    embeddings = embed_captions(assemble(None, None), [*latents.captions, ""]).to(device)
    average, transformer_done = train_transformer(
        transformer,
        latents,
        embeddings[:-1],
        embeddings[-1:],
        recipe.transformer,
        transformer_budget,
        transformer_state,
        short_frames=1 + recipe.video.short_frames // 4,
        seed=recipe.seed,
        compiled=compiled,
    )
    clock.lap("transformer")

    save_pipeline(assemble(vae, average, recipe.transformer.shift), run / "pipeline")
    clock.lap("saving")
    write_json(
        run / "run.json",
        {
            "recipe": asdict(recipe),
            "windows": len(latents.values),
            "captions": list(latents.captions),
            "autoencoder": _progress(vae_done),
            "transformer": _progress(transformer_done),
            "stage_seconds": clock.seconds,
            "pipeline_bytes": folder_size(run / "pipeline"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
            "versions": {
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
            },
        },
    )
    print(f"pipeline: {run / 'pipeline'}, {folder_size(run / 'pipeline') / 1e6:.1f} MB", flush=True)
    return run / "pipeline"


def compile_ahead(recipe: Recipe, device: torch.device) -> None:
    """Compiles the transformer's blocks for both lengths with random latents, so that torch's cache on disk has them.

    Run beside the autoencoder's training; the transformer's training then begins without the wait.
    """
    video = recipe.video
    shape = (1 + video.num_frames // 4, video.height // 8, video.width // 8)
    values = torch.randn(4, 16, *shape, device=device).half()
    labels = torch.zeros(4, dtype=torch.long, device=device)
    latents = Latents(values, ("a",), labels, (0.0,) * 16, (1.0,) * 16)
    text = embed_captions(assemble(None, None), ["a", ""]).to(device)
    trainer = TransformerTrainer(
        build_transformer(recipe.transformer).to(device),
        latents,
        text[:1],
        text[1:],
        recipe.transformer,
        short_frames=1 + video.short_frames // 4,
        seed=0,
        compiled=True,
    )
    with trainer.attention_kernels():
        for _ in range(2):
            began = time.monotonic()
            loss = trainer.step(0.0).item()
            trainer.state.step += 1
            print(f"compile: {time.monotonic() - began:.1f} s, loss {loss:.3f}", flush=True)


class _Clock:
    """Seconds of each stage, over all runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        self.last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self.last, 1)
        self.last = now
        write_json(self.path, self.seconds)


def _progress(state: TrainingState) -> dict[str, Any]:
    return {"iterations": state.step, "seconds": round(state.elapsed, 1), "curve": state.curve}


def _claim(path: Path, recipe: Recipe) -> None:
    content = json.loads(json.dumps(asdict(recipe)))
    if path.exists() and json.loads(path.read_text()) != content:
        raise InputError(f"run folder {str(path.parent)!r} belongs to another recipe; take another folder")
    write_json(path, content)
