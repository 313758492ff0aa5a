"""Wan2.1 and Wan2.2, text-to-video and image-to-video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from draftattn.layout import TokenGrid
from draftattn.pipelines.video.adapter import TokenSite, VideoAdapter


class WanAdapter(VideoAdapter):
    """Self-attention over video tokens alone; text and image enter through cross-attention, which stays as it is."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("WanTransformer3DModel",)
    token_sites: ClassVar[tuple[TokenSite, ...]] = (
        TokenSite("patch_embedding", dims=(2, 3, 4)),
        TokenSite("rope", dims=(1,)),
        TokenSite("proj_out", dims=(1,), restores=True),
    )
    vae_in_float32: ClassVar[bool] = True

    def token_grid(self, transformer: Any, arguments: dict[str, Any]) -> TokenGrid:
        """See `VideoAdapter`."""
        _, _, frames, height, width = arguments["hidden_states"].shape
        patch_frames, patch_height, patch_width = transformer.config.patch_size
        return TokenGrid(frames // patch_frames, height // patch_height, width // patch_width)

    def attention_layers(self, transformer: Any) -> Sequence[nn.Module]:
        """See `VideoAdapter`."""
        return [block.attn1 for block in transformer.blocks]

    def frame_order_reason(self, transformer: Any, arguments: dict[str, Any]) -> str | None:
        """Wan2.2-TI2V-5B passes one timestep per token."""
        del transformer
        return "it has a timestep per token" if arguments["timestep"].ndim == 2 else None

    def num_layers(self, transformer_config: dict[str, Any]) -> int:
        """See `VideoAdapter`."""
        return transformer_config.get("num_layers", 40)

    def size_multiples(self, vae_config: dict[str, Any], transformer_config: dict[str, Any]) -> tuple[int, int]:
        """See `VideoAdapter`."""
        patch = transformer_config.get("patch_size", (1, 2, 2))[1]
        return vae_config.get("scale_factor_spatial", 8) * patch, vae_config.get("scale_factor_temporal", 4)
