"""The transformer: how it is built and trained by flow matching."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .latents import Latents
from .loop import Budget, run_loop, schedule
from .muon import Muon
from .recipe import TransformerRecipe
from .state import TrainingState


def build_transformer(recipe: TransformerRecipe) -> Any:
    """An untrained transformer in Wan2.1's layout, heads of 64 dimensions; its first prediction is zero."""
    transformer: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=recipe.num_heads,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=256,
        ffn_dim=recipe.ffn_dim,
        num_layers=recipe.num_layers,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def train_transformer(
    transformer: Any,
    latents: Latents,
    embeddings: Tensor,
    empty: Tensor,
    recipe: TransformerRecipe,
    budget: Budget,
    checkpoint: Path,
    *,
    short_frames: int,
    seed: int,
    compiled: bool,
) -> tuple[Any, TrainingState]:
    """Trains on latents; returns the averaged network and the final state.

    Args:
        embeddings: of the captions of ``latents``, ``[captions, tokens, 64]``.
        empty: of the empty caption, ``[1, tokens, 64]``.
        short_frames: latent frames of the shorter windows.
    """
    trainer = TransformerTrainer(
        transformer, latents, embeddings, empty, recipe, short_frames=short_frames, seed=seed, compiled=compiled
    )
    with trainer.attention_kernels():
        run_loop("transformer", trainer.state, budget, trainer.step, checkpoint)
    return trainer.average.eval(), trainer.state


class TransformerTrainer:
    """One iteration of the transformer's training, and the state it changes."""

    def __init__(
        self,
        transformer: Any,
        latents: Latents,
        embeddings: Tensor,
        empty: Tensor,
        recipe: TransformerRecipe,
        *,
        short_frames: int,
        seed: int,
        compiled: bool,
    ) -> None:
        self.recipe, self.latents, self.short_frames = recipe, latents, short_frames
        self.device = latents.values.device
        self.embeddings = torch.cat([embeddings, empty])
        self.transformer = transformer.train()
        self.average = copy.deepcopy(transformer).requires_grad_(False)
        if compiled:
            for block in transformer.blocks:
                block.compile(dynamic=False)
        matrices = [weight for weight in transformer.blocks.parameters() if weight.ndim == 2]
        if not recipe.muon_learning_rate:
            matrices = []
        chosen = {id(weight) for weight in matrices}
        others = [weight for weight in transformer.parameters() if id(weight) not in chosen]
        self.rates: dict[str, float] = {"adamw": recipe.learning_rate}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(
                others,
                recipe.learning_rate,
                (0.9, 0.99),
                weight_decay=recipe.weight_decay,
                fused=self.device.type == "cuda",
            )
        }
        if matrices:
            self.rates["muon"] = recipe.muon_learning_rate
            self.optimizers["muon"] = Muon(matrices, recipe.muon_learning_rate, weight_decay=recipe.weight_decay)
        self.random = torch.Generator(self.device).manual_seed(seed)
        self.state = TrainingState(
            {"transformer": transformer, "average": self.average}, self.optimizers, {"random": self.random}
        )

    def attention_kernels(self) -> AbstractContextManager[None]:
        """cuDNN's attention first: the fastest of torch's on the GPUs this is meant for."""
        if self.device.type != "cuda":
            return nullcontext()
        kernels = [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
        return sdpa_kernel(kernels, set_priority=True)

    def step(self, share: float) -> Tensor:
        """One iteration; returns its loss."""
        recipe = self.recipe
        # two of three batches are short in the first half, two of three are long in the second
        short = (self.state.step % 3 != 0) == (share < 0.5)
        loss = self.loss(
            *((recipe.short_batch, self.short_frames) if short else (recipe.long_batch, self.latents.values.shape[2]))
        )
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * schedule(share, recipe.warmup, recipe.decay_start)
            optimizer.step()
        self._update_average()
        return loss.detach()

    def loss(self, batch: int, num_frames: int) -> Tensor:
        """Mean squared error of the predicted velocity: x_t = (1 - s) x_0 + s noise, velocity = noise - x_0."""
        latents, random, device = self.latents, self.random, self.device
        chosen = torch.randint(len(latents.values), (batch,), generator=random, device=device)
        start = latents.values[chosen, :, :num_frames].float()
        labels = latents.labels[chosen]
        dropped = torch.rand(batch, generator=random, device=device) < self.recipe.caption_dropout
        text = self.embeddings[labels.masked_fill(dropped, len(self.embeddings) - 1)]
        level = self._noise_levels(batch)
        noise = torch.randn(start.shape, generator=random, device=device)
        mixed = torch.lerp(start, noise, level.view(-1, 1, 1, 1, 1))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = self.transformer(mixed, 1000 * level, text, return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - start)

    def _noise_levels(self, batch: int) -> Tensor:
        # one draw in each of `batch` equal parts of [0, 1], in random order: less noise than independent draws
        order = torch.randperm(batch, generator=self.random, device=self.device)
        uniform = (order + torch.rand(batch, generator=self.random, device=self.device)) / batch
        shifted = self.recipe.shift * uniform / (1 + (self.recipe.shift - 1) * uniform)
        take = torch.rand(batch, generator=self.random, device=self.device) < self.recipe.shifted_share
        return torch.where(take, shifted, uniform).clamp(1e-3, 1.0)

    @torch.no_grad()
    def _update_average(self) -> None:
        # the state's step is raised after this iteration
        past = (1 - 1 / (self.state.step + 1)) ** (self.recipe.ema_power + 1)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.transformer.parameters()), 1 - past)
