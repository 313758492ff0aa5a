"""What a pipeline folder can do: reconstruction, flow loss on fixed noise, samples. Serves any Wan pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from draftattn.eval.metrics.lpips import lpips
from draftattn.eval.metrics.psnr import psnr
from draftattn.files import written_whole

from .clips import Shot, Window, cut, held_out_windows, learnt_windows
from .pipeline_folder import folder_size
from .recipe import VideoRecipe
from .text import embed_captions

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
SHEET_CAPTIONS = (
    "hands moving red cups on a white table",
    "a woman playing with a dog on a path",
    "a man juggling a football in a park",
    "cars driving on a road seen from above",
    "two children jumping on a bed",
    "a cartoon bird standing on a branch",
)


@torch.no_grad()
def evaluate(
    folder: Path,
    shots: Sequence[Shot],
    video: VideoRecipe,
    device: torch.device,
    *,
    windows_per_shot: int = 2,
    sheet: Path | None = None,
    sheet_captions: Sequence[str] = SHEET_CAPTIONS,
    steps: int = 30,
    guidance_scale: float = 4.5,
) -> dict[str, Any]:
    """Measures a pipeline on the windows held out and on one window of each caption learnt.

    Reconstruction and losses are computed in float32 from the saved weights, through diffusers' own encode and decode.

    Args:
        folder: a saved ``WanPipeline``.
        shots: as read with `clips.read_shots`.
        video: size and length of windows.
        device: where it runs.
        windows_per_shot: windows of each shot that is held out.
        sheet: a JPEG with samples, one caption a row; None draws none.
        sheet_captions: its captions.
        steps: of its samples.
        guidance_scale: of its samples.

    Returns:
        figures for machines: ``sizes``, ``reconstruction`` and ``flow_loss`` for ``held_out`` and ``learnt``.
    """
    began = time.monotonic()
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    groups = {
        "held_out": held_out_windows(shots, video, windows_per_shot),
        "learnt": learnt_windows(shots, video),
    }
    result: dict[str, Any] = {
        "sizes": {
            "bytes": folder_size(folder),
            "vae_parameters": sum(p.numel() for p in pipe.vae.parameters()),
            "transformer_parameters": sum(p.numel() for p in pipe.transformer.parameters()),
            "transformer_layers": pipe.transformer.config.num_layers,
        },
        "windows": {"height": video.height, "width": video.width, "num_frames": video.num_frames},
        "reconstruction": {},
        "flow_loss": {},
    }
    for name, windows in groups.items():
        latents = []
        rows = []
        for window in windows:
            reference = cut(shots[window.shot], window, video)[None]
            latent = pipe.vae.encode(reference).latent_dist.mode()
            latents.append(_normalised(pipe.vae, latent))
            rows.append(_compare(pipe.vae.decode(latent).sample[0], reference[0]))
        result["reconstruction"][name] = _reconstruction(shots, windows, rows, video)
        result["flow_loss"][name] = _flow_loss(pipe, shots, windows, latents)
    if sheet is not None:
        if device.type == "cuda":
            pipe = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16).to(device)
            pipe.set_progress_bar_config(disable=True)
        draw_sheet(pipe, sheet, sheet_captions, video, steps, guidance_scale)
        result["sheet"] = {
            "captions": list(sheet_captions),
            "steps": steps,
            "guidance_scale": guidance_scale,
            "seed": 0,
        }
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def _normalised(vae: Any, latent: Tensor) -> Tensor:
    mean, std = (
        latent.new_tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latent - mean) / std


def _compare(output: Tensor, reference: Tensor) -> dict[str, Tensor]:
    images, target = (((x.clamp(-1, 1) + 1) / 2).transpose(0, 1) for x in (output, reference))
    drift = (output.clamp(-1, 1) - reference).mean((2, 3)).abs().mean(0)
    return {"psnr": psnr(images, target), "lpips": lpips(images, target), "colour_error": drift}


def _reconstruction(
    shots: Sequence[Shot], windows: Sequence[Window], rows: list[dict[str, Tensor]], video: VideoRecipe
) -> dict[str, Any]:
    curves = {key: torch.stack([row[key].cpu() for row in rows]).mean(0).tolist() for key in rows[0]}
    short = video.short_frames
    parts = {f"frames 0-{short - 1}": slice(0, short)}
    if short < video.num_frames:
        parts[f"frames {short}-{video.num_frames - 1}"] = slice(short, None)
    files: dict[str, list[float]] = {}
    for window, row in zip(windows, rows, strict=True):
        scene = shots[window.shot].scene
        files.setdefault(f"{scene.file}: {scene.caption}", []).append(row["psnr"].mean().item())
    return {
        "mean": {key: {name: fmean(curve[part]) for name, part in parts.items()} for key, curve in curves.items()},
        "per_frame": curves,
        "psnr_per_scene": {name: fmean(values) for name, values in files.items()},
    }


def _flow_loss(pipe: Any, shots: Sequence[Shot], windows: Sequence[Window], latents: list[Tensor]) -> dict[str, Any]:
    captions = [shots[window.shot].scene.caption for window in windows]
    embeddings = embed_captions(pipe, captions)
    noise_source = torch.Generator().manual_seed(1234)
    levels = torch.tensor(NOISE_LEVELS, device=latents[0].device)
    losses = []
    for latent, text in zip(latents, embeddings, strict=True):
        start = latent.expand(len(levels), -1, -1, -1, -1)
        noise = torch.randn(start.shape, generator=noise_source).to(start)
        mixed = torch.lerp(start, noise, levels.view(-1, 1, 1, 1, 1))
        velocity = pipe.transformer(mixed, 1000 * levels, text.expand(len(levels), -1, -1), return_dict=False)[0]
        losses.append(F.mse_loss(velocity, noise - start, reduction="none").mean((1, 2, 3, 4)).cpu())
    table = torch.stack(losses)
    scenes: dict[str, list[float]] = {}
    for caption, row in zip(captions, table.mean(1).tolist(), strict=True):
        scenes.setdefault(caption, []).append(row)
    return {
        "mean": table.mean().item(),
        "per_level": dict(zip(map(str, NOISE_LEVELS), table.mean(0).tolist(), strict=True)),
        "per_caption": {caption: fmean(values) for caption, values in scenes.items()},
    }


def draw_sheet(
    pipe: Any, path: Path, captions: Sequence[str], video: VideoRecipe, steps: int, guidance_scale: float
) -> None:
    """A JPEG with one caption a row: five frames, from the first to the last, of a sample with seed 0."""
    shown = np.linspace(0, video.num_frames - 1, 5).round().astype(int)
    width, height, text_height = video.width // 2, video.height // 2, 14
    image = Image.new("RGB", (width * len(shown), (height + text_height) * len(captions)))
    draw = ImageDraw.Draw(image)
    for row, caption in enumerate(captions):
        frames = pipe(
            caption,
            height=video.height,
            width=video.width,
            num_frames=video.num_frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).frames[0]
        top = row * (height + text_height)
        draw.text((2, top + 1), f"{caption}; frames {', '.join(map(str, shown))}", fill="white")
        for column, index in enumerate(shown):
            frame = Image.fromarray((np.clip(frames[index], 0, 1) * 255).round().astype(np.uint8))
            image.paste(frame.resize((width, height), Image.Resampling.LANCZOS), (column * width, top + text_height))
    with written_whole(path) as temporary:
        image.save(temporary, quality=88)
