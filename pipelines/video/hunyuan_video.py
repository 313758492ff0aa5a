"""HunyuanVideo, text-to-video and image-to-video."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from draftattn.layout import TokenGrid
from draftattn.pipelines.video.adapter import TextTokens, TokenSite, VideoAdapter


class _TextMask(NamedTuple):
    mask: Tensor
    version: int
    longest: int
    shortest: int
    is_prefix: bool


class JointAttentionAdapter(VideoAdapter):
    """What the HunyuanVideo families share: attention over video tokens followed by those of the conditions."""

    has_text_tokens: ClassVar[bool] = True
    token_sites: ClassVar[tuple[TokenSite, ...]] = (
        TokenSite("x_embedder", dims=(1,)),
        TokenSite("rope", dims=(0,)),
        TokenSite("proj_out", dims=(1,), restores=True),
    )

    def token_grid(self, transformer: Any, arguments: dict[str, Any]) -> TokenGrid:
        """See `VideoAdapter`."""
        _, _, frames, height, width = arguments["hidden_states"].shape
        patch, patch_frames = transformer.config.patch_size, transformer.config.patch_size_t
        return TokenGrid(frames // patch_frames, height // patch, width // patch)


class HunyuanVideoAdapter(JointAttentionAdapter):
    """Joint attention over video tokens followed by text tokens; dual-stream blocks first, then single-stream."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("HunyuanVideoTransformer3DModel",)

    def __init__(self) -> None:
        # A pipeline passes the same mask tensors in every step; reading one costs a host sync.
        self._seen: deque[_TextMask] = deque(maxlen=4)

    def attention_layers(self, transformer: Any) -> Sequence[nn.Module]:
        """See `VideoAdapter`."""
        return [block.attn for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]

    def prepare_text(self, arguments: dict[str, Any]) -> TextTokens:
        """Cuts the text to the longest prompt of the batch: padding is then dropped, not masked, in every layer.

        Only the leading ``mask.sum()`` text tokens are ever attended to by this model, so the result is the same.
        """
        text = self._read_mask(arguments["encoder_attention_mask"])
        full_length = text.mask.shape[1]
        if text.is_prefix and text.longest < full_length:
            # The refiner averages over valid tokens, so at least one must remain.
            kept = max(1, text.longest)
            arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :kept]
            arguments["encoder_attention_mask"] = text.mask[:, :kept]
            full_length = kept
        if text.shortest == full_length:
            return TextTokens(mask_is_full=True)
        return TextTokens(lengths=text.mask.sum(1, dtype=torch.int))

    def frame_order_reason(self, transformer: Any, arguments: dict[str, Any]) -> str | None:
        """Image-to-video by token replacement modulates the first frame on its own."""
        del arguments
        replaces = transformer.config.image_condition_type == "token_replace"
        return "its first frame is modulated on its own" if replaces else None

    def num_layers(self, transformer_config: dict[str, Any]) -> int:
        """See `VideoAdapter`."""
        return transformer_config.get("num_layers", 20) + transformer_config.get("num_single_layers", 40)

    def size_multiples(self, vae_config: dict[str, Any], transformer_config: dict[str, Any]) -> tuple[int, int]:
        """See `VideoAdapter`."""
        patch = transformer_config.get("patch_size", 2)
        return vae_config.get("spatial_compression_ratio", 8) * patch, vae_config.get("temporal_compression_ratio", 4)

    def _read_mask(self, mask: Tensor) -> _TextMask:
        # inference tensors keep no count of in-place changes
        version = 0 if mask.is_inference() else mask._version
        for seen in self._seen:
            if seen.mask is mask and seen.version == version:
                return seen
        lengths = mask.sum(1, dtype=torch.int).tolist()  # the mask may be bfloat16, which cannot count past 256
        is_prefix = bool((mask.bool().cummin(1).values == mask.bool()).all())
        self._seen.append(_TextMask(mask, version, int(max(lengths)), int(min(lengths)), is_prefix))
        return self._seen[-1]
