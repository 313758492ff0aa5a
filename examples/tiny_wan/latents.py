"""Latents of all windows, encoded once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from draftattn.files import written_whole

from .clips import Shot, Window, cut
from .recipe import VideoRecipe
from .whole_clip import WholeClip


@dataclass(frozen=True)
class Latents:
    """What the transformer learns.

    Args:
        values: float16 ``[windows, 16, latent frames, height / 8, width / 8]``, normalised per channel.
        captions: the captions, each once.
        labels: int64 ``[windows]``, the caption of each window.
        mean: of each channel before normalisation.
        std: likewise.
    """

    values: Tensor
    captions: tuple[str, ...]
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        words = {"captions": json.dumps(self.captions), "mean": json.dumps(self.mean), "std": json.dumps(self.std)}
        with written_whole(path) as temporary:
            save_file({"values": self.values.cpu().contiguous(), "labels": self.labels.cpu()}, temporary, words)

    @staticmethod
    def load(path: Path, device: torch.device) -> Latents:
        """Reads what `save` wrote."""
        with safe_open(path, "pt") as file:
            words = {name: tuple(json.loads(value)) for name, value in file.metadata().items()}
            values, labels = file.get_tensor("values").to(device), file.get_tensor("labels").to(device)
        return Latents(values, words["captions"], labels, words["mean"], words["std"])


@torch.no_grad()
def encode_windows(
    vae: Any, shots: Sequence[Shot], windows: Sequence[Window], video: VideoRecipe, batch: int = 4
) -> Latents:
    """Encodes windows to the means of their latents and measures mean and deviation of each channel."""
    device = next(vae.parameters()).device
    clip = WholeClip(vae)
    captions = tuple(dict.fromkeys(shots[window.shot].scene.caption for window in windows))
    means = []
    began = time.monotonic()
    for first in range(0, len(windows), batch):
        pixels = torch.stack([cut(shots[w.shot], w, video) for w in windows[first : first + batch]])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            means.append(clip.encode(pixels)[0].to(torch.float32))
    values = torch.cat(means)
    mean, std = values.mean((0, 2, 3, 4)), values.std((0, 2, 3, 4))
    values -= mean.view(1, -1, 1, 1, 1)
    values /= std.view(1, -1, 1, 1, 1)
    labels = torch.tensor([captions.index(shots[w.shot].scene.caption) for w in windows], device=device)
    result = Latents(values.half(), captions, labels, tuple(mean.tolist()), tuple(std.tolist()))
    print(
        f"latents: {len(windows):,} windows of {len(captions)} captions in {time.monotonic() - began:.0f} s", flush=True
    )
    return result
