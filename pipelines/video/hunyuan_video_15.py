"""HunyuanVideo-1.5, text-to-video and image-to-video."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor, nn

from draftattn.pipelines.video.adapter import TextTokens
from draftattn.pipelines.video.hunyuan_video import JointAttentionAdapter


class _Conditions(NamedTuple):
    """What was read from the masks and the image of one prompt.

    Args:
        sources: the tensors it was read from.
        versions: how often they had been changed in place.
        columns: for the two texts, which columns any item uses; None where all are.
        has_image: whether there is an image to condition on.
        lengths: valid tokens of each item, texts and image together.
        is_full: whether nothing is left to mask once unused columns are dropped.
    """

    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    columns: tuple[Tensor | None, Tensor | None]
    has_image: bool
    lengths: Tensor
    is_full: bool


class HunyuanVideo15Adapter(JointAttentionAdapter):
    """Joint attention over video tokens followed by image, glyph and text tokens; dual-stream blocks only.

    The model orders each item's conditions itself, valid ones first. Its attention processor would build a mask of
    tokens × tokens in every layer; while draft attention is on it gets one without memory, which nobody reads.
    """

    transformer_classes: ClassVar[tuple[str, ...]] = ("HunyuanVideo15Transformer3DModel",)

    def __init__(self) -> None:
        # A pipeline passes the same tensors in every step; reading them costs a host sync.
        self._seen: deque[_Conditions] = deque(maxlen=4)

    def attention_layers(self, transformer: Any) -> Sequence[nn.Module]:
        """See `VideoAdapter`."""
        return [block.attn for block in transformer.transformer_blocks]

    def prepare_text(self, arguments: dict[str, Any]) -> TextTokens:
        """Drops text columns that no item of the batch uses, and the image tokens of text-to-video.

        The model masks them in every layer, and nothing else in it mixes tokens of the conditions, so the result is the
        same.
        """
        found = self._read(arguments)
        names = (
            ("encoder_hidden_states", "encoder_attention_mask"),
            ("encoder_hidden_states_2", "encoder_attention_mask_2"),
        )
        for pair, columns in zip(names, found.columns, strict=True):
            if columns is not None:
                arguments.update({name: arguments[name].index_select(1, columns) for name in pair})
        if not found.has_image:
            arguments["image_embeds"] = arguments["image_embeds"][:, :0]
        return TextTokens(mask_is_full=True) if found.is_full else TextTokens(lengths=found.lengths)

    def reroute_processor(self, processor: Any) -> Any:
        """See `VideoAdapter`; a processor that is not the stock one is left as it is."""
        if type(processor) is not HunyuanVideo15AttnProcessor2_0:
            return processor
        without_mask = _ProcessorWithoutMask()
        vars(without_mask).update(vars(processor))
        return without_mask

    def num_layers(self, transformer_config: dict[str, Any]) -> int:
        """See `VideoAdapter`."""
        return transformer_config.get("num_layers", 54)

    def size_multiples(self, vae_config: dict[str, Any], transformer_config: dict[str, Any]) -> tuple[int, int]:
        """See `VideoAdapter`."""
        patch = transformer_config.get("patch_size", 1)
        return vae_config.get("spatial_compression_ratio", 16) * patch, vae_config.get("temporal_compression_ratio", 4)

    @torch.inference_mode(False)  # a cached inference tensor would break later autograd
    def _read(self, arguments: dict[str, Any]) -> _Conditions:
        names = ("encoder_attention_mask", "encoder_attention_mask_2", "image_embeds")
        sources = tuple(arguments[name] for name in names)
        # inference tensors keep no count of in-place changes
        versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in sources)
        for seen in self._seen:
            same = all(a is b for a, b in zip(seen.sources, sources, strict=True))
            if same and seen.versions == versions:
                return seen
        text, glyphs, image = sources
        has_image = bool((image != 0).any())
        lengths = text.bool().sum(1) + glyphs.bool().sum(1) + (image.shape[1] if has_image else 0)
        # the refiner averages over valid tokens of the text, so at least one column must remain
        columns = _used_columns(text, at_least=1), _used_columns(glyphs)
        kept = sum(mask.shape[1] if used is None else len(used) for mask, used in zip(sources, columns, strict=False))
        kept += image.shape[1] if has_image else 0
        is_full = int(lengths.min()) == kept
        self._seen.append(_Conditions(sources, versions, columns, has_image, lengths.int(), is_full))
        return self._seen[-1]


def _used_columns(mask: Tensor, at_least: int = 0) -> Tensor | None:
    used = mask.bool().any(0)
    used[:at_least] |= ~used.any()
    return None if bool(used.all()) else used.nonzero().squeeze(1)


class _ProcessorWithoutMask(HunyuanVideo15AttnProcessor2_0):
    """The stock processor, whose mask of tokens × tokens is made on a device that has no memory."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if attention_mask is not None:
            attention_mask = torch.empty_like(attention_mask, device="meta")
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
