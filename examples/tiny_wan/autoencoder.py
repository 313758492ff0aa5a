"""The video autoencoder: how it is built and trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from draftattn.eval.metrics.lpips import load_weights, weighted_distance

from .clips import Shot
from .loop import Budget, run_loop, schedule
from .recipe import AutoencoderRecipe, Crops
from .state import TrainingState
from .whole_clip import WholeClip


def build_autoencoder(recipe: AutoencoderRecipe) -> Any:
    """An untrained autoencoder with 16 latent channels, 8x8 compression in space and 4x in time."""
    return AutoencoderKLWan(
        base_dim=recipe.base_dim,
        decoder_base_dim=recipe.decoder_base_dim,
        z_dim=16,
        dim_mult=list(recipe.dim_mult),
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
    )


def train_autoencoder(
    vae: Any,
    shots: Sequence[Shot],
    recipe: AutoencoderRecipe,
    budget: Budget,
    checkpoint: Path,
    *,
    seed: int,
    compiled: bool,
) -> TrainingState:
    """Trains on crops of the shots that are not held out; returns the final state."""
    device = next(vae.parameters()).device
    vae.train()
    trainer = AutoencoderTrainer(vae, shots, recipe, seed=seed, compiled=compiled)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    channels_last = trainer.channels_last_is_faster() if recipe.channels_last is None else recipe.channels_last
    set_layout(vae, channels_last)
    print(f"autoencoder: channels_last_3d is {'on' if channels_last else 'off'}", flush=True)
    run_loop("autoencoder", trainer.state, budget, trainer.step, checkpoint)
    set_layout(vae, False)
    vae.eval()
    return trainer.state


class AutoencoderTrainer:
    """One iteration of the autoencoder's training, and the state it changes."""

    def __init__(
        self, vae: Any, shots: Sequence[Shot], recipe: AutoencoderRecipe, *, seed: int, compiled: bool
    ) -> None:
        self.recipe = recipe
        self.shots = [shot for shot in shots if not shot.scene.held_out]
        self.device = next(vae.parameters()).device
        self.vae = vae
        self.clip = WholeClip(vae, compiled)
        self.optimizer = torch.optim.AdamW(vae.parameters(), recipe.learning_rate, (0.9, 0.99), weight_decay=0.0)
        self.places = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(self.device).manual_seed(seed)
        self.features = load_weights(self.device)
        self.state = TrainingState(
            {"vae": vae}, {"adamw": self.optimizer}, {"places": self.places, "noise": self.noise}
        )

    def step(self, share: float) -> Tensor:
        """One iteration; returns its loss."""
        recipe = self.recipe
        batches = recipe.early if share < 0.5 else recipe.late
        video = draw_crops(self.shots, batches[self.state.step % len(batches)], self.places)
        loss = self.loss(video)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(share, recipe.warmup, recipe.decay_start)
        self.optimizer.step()
        return loss.detach()

    def loss(self, video: Tensor) -> Tensor:
        """Loss of reconstructing a video in [-1, 1]: pixels, their changes in time, features, and the prior."""
        recipe = self.recipe
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean, log_variance = (moment.float() for moment in self.clip.encode(video))
            noise = torch.randn(mean.shape, generator=self.noise, device=self.device)
            output = self.clip.decode(mean + (log_variance / 2).exp() * noise).float()
            chosen = torch.randint(video.shape[0] * video.shape[2], (recipe.lpips_frames,), generator=self.places)
            chosen = chosen.to(self.device, non_blocking=True)
            images, target = ((x.transpose(1, 2).flatten(0, 1)[chosen] + 1) / 2 for x in (output, video))
            features = weighted_distance(images, target, self.features).mean()
        error = output - video
        prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return (
            error.abs().mean()
            + recipe.mse_weight * error.square().mean()
            + recipe.temporal_weight * error.diff(dim=2).abs().mean()
            + recipe.lpips_weight * features
            + recipe.kl_weight * prior
        )

    def channels_last_is_faster(self) -> bool:
        """Times forward and backward in both memory layouts; leaves the weights as they are."""
        seconds = {}
        places = torch.Generator().manual_seed(0)
        video = draw_crops(self.shots, self.recipe.early[0], places)
        saved = self.noise.get_state(), self.places.get_state()
        for layout in (False, True):
            set_layout(self.vae, layout)
            for repeat in range(6):
                if repeat == 3:
                    self._wait()
                    began = time.monotonic()
                self.optimizer.zero_grad(set_to_none=True)
                self.loss(video).backward()
            self._wait()
            seconds[layout] = time.monotonic() - began
        self.optimizer.zero_grad(set_to_none=True)
        self.noise.set_state(saved[0])
        self.places.set_state(saved[1])
        rates = ", ".join(f"{'on' if layout else 'off'} {value / 3:.4f} s" for layout, value in seconds.items())
        print(f"autoencoder: forward and backward with channels_last_3d {rates}", flush=True)
        return seconds[True] < seconds[False]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def set_layout(vae: Any, channels_last: bool) -> None:
    """Puts the weights of all convolutions into one memory layout; outputs follow it."""
    layouts = {True: (torch.channels_last, torch.channels_last_3d), False: (torch.contiguous_format,) * 2}[
        channels_last
    ]
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            weight = module.weight
            weight.data = weight.data.contiguous(memory_format=layouts[weight.ndim - 4])


def draw_crops(shots: Sequence[Shot], crops: Crops, places: torch.Generator) -> Tensor:
    """A batch of random crops in [-1, 1], half of them mirrored: every caption as often, every place as likely."""
    captions = list(dict.fromkeys(shot.scene.caption for shot in shots))
    drawn = []
    for which, among, pace, time_, top, left, mirror in torch.rand(crops.batch, 7, generator=places).tolist():
        same = [shot for shot in shots if shot.scene.caption == captions[int(which * len(captions))]]
        shot = same[int(among * len(same))]
        stride = 1 + int(pace * shot.stride)
        length, _, height, width = shot.frames.shape
        span = (crops.num_frames - 1) * stride + 1
        start = int(time_ * (length - span + 1))
        y, x = int(top * (height - crops.height + 1)), int(left * (width - crops.width + 1))
        cut = shot.frames[start : start + span : stride, :, y : y + crops.height, x : x + crops.width]
        drawn.append(cut.flip(-1) if mirror < 0.5 else cut)
    return (torch.stack(drawn).transpose(1, 2).float() / 127.5 - 1).contiguous()
