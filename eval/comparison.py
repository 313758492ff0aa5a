"""Draft against dense: the same prompt and seed, one table, one JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from draftattn.config import DraftConfig
from draftattn.eval.environment import device_name, package_versions
from draftattn.eval.frames import to_bytes
from draftattn.eval.generation import Generation
from draftattn.eval.metrics import score_video
from draftattn.eval.settings import config_to_json
from draftattn.files import written_whole
from draftattn.pipelines.video.stats import DraftStats


def compare(
    dense: Generation,
    draft: Generation,
    stats: DraftStats,
    config: DraftConfig,
    settings: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """Time, density and quality of a draft video against the dense video of the same prompt and seed.

    Quality is measured on the decoded frames in 8 bits, before encoding. A draft step is one after the warm-up.

    Args:
        dense: the dense generation.
        draft: the draft-attention generation.
        stats: its statistics.
        config: its settings.
        settings: the rest of what was asked for (model, prompt, size, seed, …), kept as it is.
        device: what it ran on.

    Returns:
        A dictionary that JSON can hold.
    """
    warmup = config.num_warmup_steps(len(draft.step_seconds))
    scores = score_video(to_bytes(draft.video), to_bytes(dense.video), device=device)
    dense_step, draft_step = dense.median_step(), draft.median_step(warmup)
    return {
        "settings": {**settings, "draft": config_to_json(config)},
        "dense": _times(dense, dense_step),
        "draft": {
            **_times(draft, draft_step),
            "warmup_steps": warmup,
            "density": round(stats.density, 4),
            "run_density": round(stats.run_density, 4),
            "mask_seconds": round(stats.mask_seconds, 4),
        },
        "speedup": {"step": round(dense_step / draft_step, 3), "run": round(dense.seconds / draft.seconds, 3)},
        "quality": {name: score.to_json() for name, score in scores.items()},
        "device": device_name(device),
        "versions": package_versions(),
    }


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _times(generation: Generation, step: float) -> dict[str, float]:
    return {
        "seconds": round(generation.seconds, 3),
        "step_seconds": round(step, 4),
        "decode_seconds": round(generation.decode_seconds, 3),
    }
