"""The model card, from the figures of a run: none is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from draftattn.files import written_whole

from .evaluate import NOISE_LEVELS


def write_card(
    path: Path,
    run: dict[str, Any],
    evaluation: dict[str, Any],
    clips: dict[str, Any],
    against: dict[str, Any] | None = None,
) -> None:
    """Writes the card, whole or not at all.

    Args:
        path: the README.md to write.
        run: ``run.json`` of a finished run.
        evaluation: figures of its pipeline, as from `evaluate.evaluate`.
        clips: content of the captions file.
        against: figures of another pipeline on the same windows.
    """
    with written_whole(path) as temporary:
        temporary.write_text(card(run, evaluation, clips, against))


def card(
    run: dict[str, Any], evaluation: dict[str, Any], clips: dict[str, Any], against: dict[str, Any] | None = None
) -> str:
    """The card's Markdown."""
    sizes, recipe = evaluation["sizes"], run["recipe"]
    video, vae, transformer = recipe["video"], recipe["autoencoder"], recipe["transformer"]
    minutes = (run["autoencoder"]["seconds"] + run["transformer"]["seconds"]) / 60
    grid = f"{video['height'] // 16}x{video['width'] // 16}"
    return f"""# tiny-wan: a small trained text-to-video model in the Wan layout

A `WanPipeline` folder ({sizes["bytes"] / 1e6:.0f} MB, bf16) that loads offline with stock diffusers classes. It is
really trained, {minutes:.1f} minutes from scratch on one {run["device"]}, so its self-attention has learnt structure:
dense and block-sparse attention can be compared on it on a laptop. It is a test model, not a generator of anything
useful: it has seen {len(run["captions"])} scenes and reproduces them. `examples/tiny_wan` is the program that made it,
and wrote this file.

```python
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("tiny-wan")            # fp32; dtype=torch.bfloat16 also works
video = pipe("{run["captions"][1]}", height={video["height"]}, width={video["width"]}, num_frames={video["num_frames"]},
             num_inference_steps=12, guidance_scale=4.5, generator=torch.Generator().manual_seed(0)).frames[0]
```

Keep `max_sequence_length` at its default, 512: the model was trained with it. Made with {_versions(run)}.

## Parts

| part | class | size | |
|---|---|---|---|
| transformer | `WanTransformer3DModel` | {sizes["transformer_parameters"] / 1e6:.2f} M | \
{transformer["num_layers"]} layers, {transformer["num_heads"]} heads x 64, ffn {transformer["ffn_dim"]}, text_dim 64, \
patch (1,2,2), q/k RMS norm, rotary embedding; averaged weights |
| vae | `AutoencoderKLWan` | {sizes["vae_parameters"] / 1e6:.2f} M | pixels folded 2x2 (`patch_size` 2), then base_dim \
{vae["base_dim"]} (encoder) and {vae["decoder_base_dim"]} (decoder), dim_mult {list(vae["dim_mult"])}, 16 latent \
channels, 8x8 in space and 4x in time; latents_mean and latents_std measured on the training windows |
| text_encoder | `UMT5EncoderModel` | 0.09 M | d_model 64, 2 layers, **random and frozen**: it only tells captions \
apart |
| tokenizer | `T5Tokenizer` | | one token per character |
| scheduler | `UniPCMultistepScheduler` | | flow prediction, flow sigmas, flow_shift {transformer["shift"]} |

{video["height"]}x{video["width"]} gives a grid of {grid} tokens per latent frame.

## Training data

{_table(("clip", "from", "licence", "captions"), _clip_rows(clips))}

The captions above are the only prompts the model knows. No clip and no weight of another network is in this folder;
AlexNet's features (`assets/lpips`) served as a training loss.

## Training

- Autoencoder: {run["autoencoder"]["iterations"]:,} iterations in {run["autoencoder"]["seconds"]:.0f} s.
- Transformer: {run["transformer"]["iterations"]:,} iterations in {run["transformer"]["seconds"]:.0f} s, on \
{run["windows"]:,} windows of {video["num_frames"]} frames.
- Everything else (decoding clips, encoding windows, saving): \
{sum(seconds for name, seconds in run["stage_seconds"].items() if name not in ("autoencoder", "transformer")):.0f} s.

The recipe is `examples/tiny_wan/recipe.py`. Loss on the console, mean since the line before:

{_table(("share of the iterations", "autoencoder", "transformer"), _curve_rows(run))}

## Figures

From the saved weights in float32, through diffusers' own encode and decode, windows of {video["num_frames"]} frames at
{video["height"]}x{video["width"]}; *colour error* is the mean over channels of the absolute difference of a frame's
mean colour, on the scale [-1, 1]. *Held out* are whole clips or stretches of time that no training saw, *learnt* is one
window of each caption.

{_table(("", "PSNR", "LPIPS", "colour error"), _reconstruction_rows(evaluation, against))}

Held-out scenes: {_scenes(evaluation)}.

Flow loss: mean squared error of the predicted velocity on fixed noise at fixed noise levels; the target's mean square
is about 2. Latents of different autoencoders differ, so compare losses of two pipelines with care.

{_table(("", "mean", *(f"s = {level}" for level in NOISE_LEVELS)), _loss_rows(evaluation, against))}

## Limits

- It memorises {len(run["captions"])} scenes. Other prompts give mixtures of them.
- The sequence is short ({(1 + video["num_frames"] // 4) * video["height"] // 16 * video["width"] // 16:,} tokens at \
most as trained), the heads are few; its figures say nothing about large models.
- One training run, one seed.
"""


def _versions(run: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in run["versions"].items())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)).replace("| --- ", "|---")


def _clip_rows(clips: dict[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    for clip in clips["clips"]:
        captions: dict[str, list[str]] = {}
        for scene in clip["scenes"]:
            if scene.get("held_out"):
                captions.setdefault(scene["caption"], []).append(f"held out {_time(scene)}".rstrip())
            else:
                captions.setdefault(scene["caption"], [])
        words = " / ".join(caption + (f" ({', '.join(notes)})" if notes else "") for caption, notes in captions.items())
        yield clip["file"], clip["source"], clip["licence"], words


def _time(scene: dict[str, Any]) -> str:
    if "start" not in scene and "end" not in scene:
        return "whole"
    return f"{scene.get('start', 0)} s to {str(scene['end']) + ' s' if 'end' in scene else 'the end'}"


def _curve_rows(run: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        cells = []
        for part in ("autoencoder", "transformer"):
            target = share * run[part]["iterations"]
            step, _, loss = min(run[part]["curve"], key=lambda point: abs(point[0] - target))
            cells.append(f"{loss:.4f} ({step:,})")
        yield f"{share:.0%}", *cells


def _reconstruction_rows(evaluation: dict[str, Any], against: dict[str, Any] | None) -> Iterable[tuple[str, ...]]:
    for name, figures in (("", evaluation), ("the model before", against)):
        if figures is None:
            continue
        for group, values in figures["reconstruction"].items():
            mean = values["mean"]
            for part in mean["psnr"]:
                label = ", ".join(filter(None, (name, group.replace("_", " "), part)))
                yield (
                    label,
                    f"{mean['psnr'][part]:.2f} dB",
                    f"{mean['lpips'][part]:.3f}",
                    f"{mean['colour_error'][part]:.4f}",
                )


def _loss_rows(evaluation: dict[str, Any], against: dict[str, Any] | None) -> Iterable[tuple[str, ...]]:
    for name, figures in (("", evaluation), ("the model before", against)):
        if figures is None:
            continue
        for group, values in figures["flow_loss"].items():
            label = ", ".join(filter(None, (name, group.replace("_", " "))))
            yield label, f"{values['mean']:.4f}", *(f"{loss:.4f}" for loss in values["per_level"].values())


def _scenes(evaluation: dict[str, Any]) -> str:
    scenes = evaluation["reconstruction"]["held_out"]["psnr_per_scene"]
    return "; ".join(f"{name}, {value:.1f} dB" for name, value in scenes.items())
