"""What draft attention must know of a model family, and where to find it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.layout import TokenGrid


@dataclass(frozen=True)
class TokenSite:
    """A submodule whose output tensors hold the video tokens along some dimensions.

    Args:
        name: attribute of the transformer.
        dims: the dimensions that enumerate tokens: one, or the three of ``(frames, height, width)``.
        restores: False where tokens enter the blocked order, True where they leave it.
    """

    name: str
    dims: tuple[int, ...]
    restores: bool = False


@dataclass(frozen=True)
class TextTokens:
    """Text in the self-attention sequence, after the video.

    Args:
        lengths: ``[B]`` valid leading tokens of each item; None where all are valid (or there is no text).
        mask_is_full: the model's own attention mask excludes nothing, so dense attention may drop it.
    """

    lengths: Tensor | None = None
    mask_is_full: bool = False


class VideoAdapter(ABC):
    """One model family. An adapter never holds on to a model."""

    transformer_classes: ClassVar[tuple[str, ...]]
    token_sites: ClassVar[tuple[TokenSite, ...]]
    vae_in_float32: ClassVar[bool] = False  # what the model's authors recommend
    # Text shares the sequence of the self-attention, whose mask says no more than `prepare_text` does.
    has_text_tokens: ClassVar[bool] = False

    @abstractmethod
    def token_grid(self, transformer: Any, arguments: dict[str, Any]) -> TokenGrid:
        """The token grid of a forward call, from its arguments by name."""

    @abstractmethod
    def attention_layers(self, transformer: Any) -> Sequence[nn.Module]:
        """The self-attention modules in the order they run."""

    def prepare_text(self, arguments: dict[str, Any]) -> TextTokens:
        """Looks at the text of a forward call; may shorten it in ``arguments`` where that changes no result."""
        del arguments
        return TextTokens()

    def reroute_processor(self, processor: Any) -> Any:
        """What an attention module gets while it is rerouted, for a copy of its processor that may be changed."""
        return processor

    def frame_order_reason(self, transformer: Any, arguments: dict[str, Any]) -> str | None:
        """Why this call needs frames to stay in order, which tiles of several frames would break; None if not."""
        del transformer, arguments
        return None

    @abstractmethod
    def num_layers(self, transformer_config: dict[str, Any]) -> int:
        """How many self-attention layers a config describes."""

    @abstractmethod
    def size_multiples(self, vae_config: dict[str, Any], transformer_config: dict[str, Any]) -> tuple[int, int]:
        """What height and width, and the number of frames less one, must be divisible by."""


def all_adapters() -> tuple[VideoAdapter, ...]:
    """Every supported model family."""
    from draftattn.pipelines.video.hunyuan_video import HunyuanVideoAdapter
    from draftattn.pipelines.video.hunyuan_video_15 import HunyuanVideo15Adapter
    from draftattn.pipelines.video.wan import WanAdapter

    return (WanAdapter(), HunyuanVideoAdapter(), HunyuanVideo15Adapter())


def resolve_layers(layers: tuple[int, ...], num_layers: int) -> frozenset[int]:
    """Layer numbers from 0 on, for numbers that may count from the end.

    Raises:
        InputError: if there is no such layer.
    """
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise InputError(f"dense_layers names layer {layer}; the transformer has layers 0 to {num_layers - 1}")
    return frozenset(layer % num_layers for layer in layers)


def supported_classes() -> list[str]:
    """Names of the transformer classes that can be enabled."""
    return sorted(name for adapter in all_adapters() for name in adapter.transformer_classes)


def adapter_for(class_name: str) -> VideoAdapter:
    """The adapter of a transformer class.

    Raises:
        InputError: if the class is not supported; lists those that are.
    """
    for adapter in all_adapters():
        if class_name in adapter.transformer_classes:
            return adapter
    raise InputError(f"{class_name} is not supported; draft attention runs on {', '.join(supported_classes())}")
