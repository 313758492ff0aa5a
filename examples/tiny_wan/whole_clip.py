"""The causal autoencoder run over a whole clip at once.

diffusers runs it in chunks of four frames and caches the ends of each; for training that is slow. The same weights
over all frames at once give the same numbers, because every convolution in time is causal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor

from draftattn.errors import InputError

Activation = Callable[[Tensor, Tensor, int], Tensor]


def norm_silu(x: Tensor, scale: Tensor, pad: int) -> Tensor:
    """RMS norm over channels, SiLU, and ``pad`` empty frames in front, for ``x [batch, channels, frames, h, w]``.

    The length is taken in float32, the rest in the type of ``x``: the same in float32 as diffusers' norm, and in
    bfloat16 with a third of its memory traffic.
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
    x = x * length.reciprocal().to(x.dtype) * scale.to(x.dtype)
    return F.pad(F.silu(x), (0, 0, 0, 0, pad, 0))


class WholeClip:
    """Encodes and decodes whole clips with the weights of ``vae``.

    Args:
        vae: an autoencoder in Wan2.1's layout, with or without ``patch_size``.
        compiled: compiles what lies between convolutions; for GPUs.

    Raises:
        InputError: if the autoencoder has residual down- and up-sampling (Wan2.2).
    """

    def __init__(self, vae: Any, compiled: bool = False) -> None:
        if vae.config.is_residual:
            raise InputError("whole clips need an autoencoder with is_residual=False; got one with True")
        self.vae = vae
        self._activation: Activation = torch.compile(norm_silu, dynamic=True) if compiled else norm_silu

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, ``[batch, z, 1 + frames // 4, height / 8, width / 8]``, of a video
        ``[batch, 3, frames, height, width]`` in [-1, 1] with 4k + 1 frames."""
        encoder, patch_size = self.vae.encoder, self.vae.config.patch_size
        x = video if patch_size is None else patchify(video, patch_size)
        x = _causal(encoder.conv_in, x)
        for layer in encoder.down_blocks:
            x = self._layer(layer, x)
        x = self._layer(encoder.mid_block, x)
        x = self._normed(encoder.norm_out, encoder.conv_out, x)
        mean, log_variance = self.vae.quant_conv(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """The video of latents, not clamped."""
        decoder, patch_size = self.vae.decoder, self.vae.config.patch_size
        x = _causal(decoder.conv_in, self.vae.post_quant_conv(latents))
        x = self._layer(decoder.mid_block, x)
        for block in decoder.up_blocks:
            for layer in (*block.resnets, *(block.upsamplers or ())):
                x = self._layer(layer, x)
        x = self._normed(decoder.norm_out, decoder.conv_out, x)
        return x if patch_size is None else unpatchify(x, patch_size)

    def _layer(self, layer: Any, x: Tensor) -> Tensor:
        if isinstance(layer, WanResidualBlock):
            hidden = self._normed(layer.norm1, layer.conv1, x)
            return self._normed(layer.norm2, layer.conv2, hidden) + layer.conv_shortcut(x)
        if isinstance(layer, WanMidBlock):
            x = self._layer(layer.resnets[0], x)
            for attention, block in zip(layer.attentions, layer.resnets[1:], strict=True):
                x = self._layer(block, attention(x))
            return x
        if isinstance(layer, WanResample):
            return _resample(layer, x)
        if isinstance(layer, WanAttentionBlock):
            return layer(x)
        raise InputError(f"no whole-clip form of layer {type(layer).__name__}")

    def _normed(self, norm: Any, convolution: Any, x: Tensor) -> Tensor:
        x = self._activation(x, norm.gamma * norm.scale, convolution._padding[4])
        return F.conv3d(x, convolution.weight, convolution.bias, padding=(0, 1, 1))


def _causal(convolution: Any, x: Tensor) -> Tensor:
    x = F.pad(x, (0, 0, 0, 0, convolution._padding[4], 0))
    spatial = (0, convolution._padding[2], convolution._padding[0])
    return F.conv3d(x, convolution.weight, convolution.bias, convolution.stride, spatial)


def _resample(layer: Any, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        # the first latent frame stays one frame, and the others do not see it
        first, rest = x[:, :, :1], _causal(layer.time_conv, x[:, :, 1:])
        rest = rest.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
        x = torch.cat([first, rest], 2)
    batch, channels, frames, height, width = x.shape
    images = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
    if layer.mode.startswith("upsample"):
        # diffusers' upsampling passes through float32, which changes no value
        images = layer.resample[1](F.interpolate(images, scale_factor=2.0, mode="nearest-exact"))
    else:
        images = layer.resample(images)
    x = images.unflatten(0, (batch, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        rest = F.conv3d(x, layer.time_conv.weight, layer.time_conv.bias, layer.time_conv.stride)
        x = torch.cat([x[:, :, :1], rest], 2)
    return x
