"""A key-value cache of constant size: the first tokens of a text and the last ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from draftattn.errors import InputError
from draftattn.pipelines.llm.cache_layers import check_model
from draftattn.pipelines.llm.streaming_config import StreamingConfig, check_own_window
from draftattn.pipelines.llm.streaming_layer import SinkLayer, Stream
from draftattn.pipelines.llm.streaming_rotary import rotary_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SinkCache(Cache):
    """A cache for ``generate(past_key_values=...)`` that holds ``sink + window`` tokens, however long a text becomes.

    Every token attends to the first ``sink`` tokens, the last ``window`` and itself, at the positions that these have
    in the cache (StreamingLLM, arXiv 2309.17453). Keys stay at the rotary positions at which they came, and reading
    turns the sinks to right before the window: what matters to attention is the difference, so the logits are those of
    the published algorithm, which keeps keys without positions and rotates all of them at every step.

    On a stock model prompts may be as long as what a token sees, ``sink + window + 1``. With
    ``apply(model, "streaming")`` they may have any length, and no cache needs to be passed at all.

    Args:
        model: the model that the cache is for.
        sink: see `StreamingConfig`.
        window: see `StreamingConfig`.
        attention_mask: ``[B, N]`` of a prompt with left padding, which the cache has to know on a stock model.

    Raises:
        InputError: if there is no model, a number is out of range, or the model's rotary embedding or its own window
            does not allow it.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> cache = SinkCache(model, sink=2, window=6)
    >>> tokens = model.generate(
    ...     torch.tensor([[1, 2, 3]]), max_new_tokens=20, past_key_values=cache, eos_token_id=None, pad_token_id=0
    ... )
    >>> tokens.shape[1], cache.get_seq_length(), cache.num_held
    (23, 22, 8)
    """

    def __init__(
        self, model: PreTrainedModel, *, sink: int = 4, window: int = 1020, attention_mask: Tensor | None = None
    ) -> None:
        check_model(model)
        config = StreamingConfig(sink=sink, window=window)
        check_own_window(model, config)
        self.stream = Stream(config, rotary_turn(model))
        text = model.config.get_text_config()
        super().__init__(layers=[SinkLayer(self.stream) for _ in range(text.num_hidden_layers)])
        self.set_padding(attention_mask)

    @classmethod
    def of_stream(cls, stream: Stream, num_layers: int, attention_mask: Tensor | None = None) -> SinkCache:
        """A cache whose layers share what is already known of the model."""
        cache = cls.__new__(cls)
        Cache.__init__(cache, layers=[SinkLayer(stream) for _ in range(num_layers)])
        cache.stream = stream
        cache.set_padding(attention_mask)
        return cache

    @property
    def num_held(self) -> int:
        """Tokens that each layer holds."""
        return max(layer.num_sinks + layer.num_kept for layer in self.layers if isinstance(layer, SinkLayer))

    def set_padding(self, attention_mask: Tensor | None) -> None:
        """Says where the padding of a prompt stands. Waits for the device once, where there is a mask.

        Raises:
            InputError: if the mask is not ``[B, N]``, or has gaps.
        """
        self.stream.padding, self.stream.closed = None, ""
        if attention_mask is None:
            return
        left, right = padding_of(attention_mask)
        self.stream.padding = left if any(left) else None
        if any(right):
            self.stream.closed = "the prompt is padded on the right; more tokens can only follow padding on the left"

    def reset(self) -> None:
        """Back to an empty cache, for another text."""
        super().reset()
        self.set_padding(None)

    def _select_padding(self, order: Callable[[], list[int]]) -> None:
        if self.stream.padding is not None:
            self.stream.padding = tuple(self.stream.padding[item] for item in order())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the items, for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select_padding(beam_idx.tolist)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every item."""
        super().batch_repeat_interleave(repeats)
        padding = self.stream.padding or ()
        self._select_padding(lambda: [item for item in range(len(padding)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some items."""
        super().batch_select_indices(indices)
        padding = self.stream.padding or ()
        self._select_padding(lambda: torch.arange(len(padding), device=indices.device)[indices].tolist())


def padding_of(attention_mask: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of padding on the left and on the right of every item. Waits for the device.

    Args:
        attention_mask: ``[B, N]``, 1 where a token counts.

    Raises:
        InputError: if the shape is another, or tokens that count surround some that do not.

    >>> padding_of(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]))
    ((2, 0, 4), (0, 1, 0))
    """
    if attention_mask.ndim != 2:
        raise InputError(f"attention_mask has shape {list(attention_mask.shape)}; it must be [batch, tokens]")
    real = attention_mask.bool()
    length = real.shape[1]
    counts = real.sum(dim=1)
    # where nothing is real, all is padding on the left
    first = torch.where(counts > 0, real.int().argmax(dim=1), length)
    left, right, num_real = torch.stack([first, real.flip(1).int().argmax(dim=1), counts]).tolist()
    for item, (before, after, count) in enumerate(zip(left, right, num_real, strict=True)):
        if before + count + after != length:
            raise InputError(f"attention_mask of item {item} is 0 between tokens; pad at the ends")
    return tuple(left), tuple(right)
