"""What a token of a stream sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftattn.errors import InputError
from draftattn.pipelines.llm.system import SystemConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StreamingConfig(SystemConfig):
    """What a token of a stream sees besides itself. Source: StreamingLLM, arXiv 2309.17453.

    Args:
        sink: the first tokens of the text, which attract attention whatever they say (*attention sinks*).
        window: the tokens just before it.
        dense_len: none, for texts of up to ``sink + window + 1`` tokens are dense as it is.
        dense_layers: none, for the layers share a cache that evicts.

    Positions count inside the cache: once tokens have left between the two, the sinks stand right before the window.

    >>> StreamingConfig(sink=4, window=0)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    draftattn.errors.InputError: window is 0; allowed is 1 or more
    """

    sink: int = 4
    window: int = 1020

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dense_len", "dense_layers"):
            if value := getattr(self, name):
                raise InputError(
                    f"{name} is {value}; streaming serves all layers and lengths alike, so it may not be given"
                )
        for name, least in (("sink", 0), ("window", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; allowed is {least} or more")

    @property
    def size(self) -> int:
        """Tokens that a cache holds."""
        return self.sink + self.window


def check_own_window(model: PreTrainedModel, config: StreamingConfig) -> None:
    """Checks that a sliding window of the model's own hides nothing of what the cache holds.

    Raises:
        InputError: if it would.
    """
    text = model.config.get_text_config()
    own = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if own is None or (types is not None and "sliding_attention" not in types):
        return
    if config.size >= own:
        raise InputError(
            f"sink {config.sink} and window {config.window} reach over the model's own sliding window of {own} tokens; "
            f"together they may be {own - 1}"
        )
