"""A study as ``draftattn compare`` leaves it, with random figures and tiny videos."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from draftattn.config import DraftConfig
from draftattn.eval.settings import settings_grid
from draftattn.eval.study import Study, StudyFolder
from draftattn.eval.video import save_video

NUM_FRAMES, HEIGHT, WIDTH, FPS = 9, 48, 64, 8
LAYERS, STEPS = 3, 4
LOWER_IS_BETTER = ("lpips", "flicker")
PROMPTS = ("a dog & a cat", "</script><b>cups</b> {{data}}")


def brightness(frame: int) -> float:
    """How bright a frame of a dense video is: it tells the frames apart."""
    return 0.1 + 0.08 * frame


def make_study(folder: Path, *, num_prompts: int = 2, seeds: tuple[int, ...] = (7,), **axes: Any) -> dict[str, Any]:
    """Writes a finished study and gives all its runs by file name."""
    axes = axes or {"sparsity": [0.5, 0.75], "warmup": [0.25]}
    study = Study(
        model="assets/tiny-wan",
        prompts=PROMPTS[:num_prompts],
        seeds=seeds,
        settings=settings_grid([DraftConfig()], axes),
        height=HEIGHT,
        width=WIDTH,
        num_frames=NUM_FRAMES,
        num_steps=STEPS,
        guidance=3.0,
        dtype="float32",
        fps=FPS,
    )
    files = StudyFolder.open(folder, study, torch.device("cpu"))
    dice = random.Random(0)
    runs: dict[str, Any] = {}
    for run in files.runs_of(study):
        shade = torch.tensor([brightness(frame) for frame in range(NUM_FRAMES)]).view(-1, 1, 1, 1)
        video = shade.expand(NUM_FRAMES, 3, HEIGHT, WIDTH).clone()
        if run.setting is not None:
            video[:, :, :, WIDTH // 2 :] += 0.15  # the draft differs in the right half
        save_video(files.video_file(run), video, FPS)
        figures = _dense_figures() if run.setting is None else _draft_figures(dice, study.settings[run.setting])
        files.write(run, figures)
        runs[run.name] = json.loads(files.run_file(run).read_text())
    return runs


def _dense_figures() -> dict[str, Any]:
    return {"step_seconds": 2.0, "all_step_seconds": [2.0] * STEPS, "total_seconds": 10.0}


def _draft_figures(dice: random.Random, config: DraftConfig) -> dict[str, Any]:
    step = dice.uniform(1.0, 1.6)
    warmup = config.num_warmup_steps(STEPS)
    densities = [[1 if s < warmup else round(dice.uniform(0.2, 0.5), 4) for s in range(STEPS)] for _ in range(LAYERS)]
    metrics = {
        "psnr": _scores([dice.uniform(20, 30) for _ in range(NUM_FRAMES)], "psnr"),
        "ssim": _scores([dice.uniform(0.7, 1) for _ in range(NUM_FRAMES)], "ssim"),
        "lpips": _scores([dice.uniform(0, 0.3) for _ in range(NUM_FRAMES)], "lpips"),
        "flicker": _scores([None, *(dice.uniform(0, 9) for _ in range(NUM_FRAMES - 1))], "flicker"),
    }
    return {
        "density": 0.3,
        "density_by_layer_step": {"layers": list(range(LAYERS)), "steps": list(range(STEPS)), "values": densities},
        "step_seconds": step,
        "mask_seconds": 0.1,
        "total_seconds": 8.0,
        "speedup": 2.0 / step,
        "run_speedup": 1.25,
        "metrics": metrics,
    }


def _scores(per_frame: list[float | None], name: str) -> dict[str, Any]:
    values = [value for value in per_frame if value is not None]
    worst = max(values) if name in LOWER_IS_BETTER else min(values)
    return {
        "mean": sum(values) / len(values),
        "worst": worst,
        "worst_frame": per_frame.index(worst),
        "per_frame": per_frame,
    }
