"""A key-value cache of constant size: the first tokens of a text and the last ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from draftattn.errors import InputError
from draftattn.pipelines.llm.streaming_config import StreamingConfig, check_own_window
from draftattn.pipelines.llm.streaming_rotary import RotaryTurn, rotary_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Stream:
    """What the layers of one cache share.

    Args:
        config: what a token sees.
        turn: moves the sinks to where they stand in the cache.
        padding: tokens of left padding of every batch item; None where there is none.
        masked: whether the attention that reads the cache hides, within a chunk, what has left the window.
        closed: why nothing can follow any more, such as padding on the right; empty if it can.
    """

    config: StreamingConfig
    turn: RotaryTurn
    padding: tuple[int, ...] | None = None
    masked: bool = False
    closed: str = ""

    def evicted(self, seen: int) -> tuple[int, ...]:
        """Tokens of every item that the token after ``seen`` no longer sees."""
        return tuple(max(0, seen - padding - self.config.size) for padding in self.padding or (0,))


class SinkLayer(CacheLayerMixin):
    """The cache of one layer: sinks, turned when they are read, and the window as it came.

    ``keys`` and ``values`` are the window, ``[B, H_kv, <= window, D]``; of items with left padding, sinks stand at the
    end of their places until all are taken.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self.seen = 0
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty tensors of the right kind."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.sink_keys = key_states[:, :, :0], key_states[:, :, :0]
        self.values, self.sink_values = value_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of new tokens, ``[B, H_kv, N, D]``.

        Returns:
            Keys and values that the new tokens see: sinks, at their places for the first of them, window, new ones.

        Raises:
            InputError: if some of several new tokens must not see what others do, and the attention cannot hide it.
        """
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        assert self.sink_keys is not None
        assert self.sink_values is not None
        self._check(key_states)
        turned = self.sink_keys
        evicted = self.stream.evicted(self.seen)
        if turned.shape[2] and any(evicted):
            turned = self.stream.turn(turned.transpose(1, 2), evicted).transpose(1, 2)
        keys = torch.cat([turned, self.keys, key_states], dim=2)
        values = torch.cat([self.sink_values, self.values, value_states], dim=2)
        self._keep(keys, values)
        return keys, values

    def _check(self, key_states: Tensor) -> None:
        stream, count = self.stream, key_states.shape[2]
        if self.seen and stream.closed:
            raise InputError(stream.closed)
        if stream.padding is not None and len(stream.padding) != len(key_states):
            raise InputError(
                f"the batch has {len(key_states)} items and the cache is for {len(stream.padding)}; use a new cache"
            )
        longest = self.seen + count - min(stream.padding or (0,))
        if count > 1 and longest > stream.config.size + 1 and not stream.masked:
            raise InputError(
                f"{count} tokens at once go past the {stream.config.size + 1} that a token sees, and stock attention "
                'cannot hide them; use apply(model, "streaming"), which can, or generate(prefill_chunk_size=1)'
            )

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        """Puts away the last tokens as the window, and of those before it the first as sinks."""
        assert self.keys is not None
        assert self.sink_keys is not None
        sink, window = self.stream.config.sink, self.stream.config.window
        num_sinks, num_kept = self.sink_keys.shape[2], self.keys.shape[2]
        first_kept = self.seen - num_kept
        self.seen += keys.shape[2] - num_sinks - num_kept
        leaving = max(0, keys.shape[2] - num_sinks - window)
        if leaving and sink:
            # no token after these can become a sink
            taken = num_sinks + min(leaving, sink + max(self.stream.padding or (0,)))
            starts = self._first_sinks(num_sinks, taken, first_kept)
            unturned = torch.cat([self.sink_keys, keys[:, :, num_sinks:taken]], dim=2)
            self.sink_keys = _run_of_items(unturned, starts, min(sink, taken))
            self.sink_values = _run_of_items(values, starts, min(sink, taken))
        start = num_sinks + leaving
        self.keys, self.values = keys[:, :, start:], values[:, :, start:]
        if keys.shape[2] > 2 * (sink + window):
            # a view would keep the whole prompt alive
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def _first_sinks(self, num_sinks: int, taken: int, first_kept: int) -> list[int]:
        """Where the sinks of every item begin among old sinks and leaving tokens; early enough to fill all places."""
        starts = []
        for padding in self.stream.padding or (0,):
            real_sinks = min(num_sinks, max(0, first_kept - padding))
            start = num_sinks - real_sinks if real_sinks else num_sinks + max(0, padding - first_kept)
            starts.append(min(start, taken - min(self.stream.config.sink, taken)))
        return starts

    @property
    def num_sinks(self) -> int:
        """Places of sinks in what ``update`` will return."""
        return 0 if self.sink_keys is None else self.sink_keys.shape[2]

    @property
    def num_kept(self) -> int:
        """Tokens of the window."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that ``update`` will return, and the index of the first, as if they were the last tokens of the text."""
        held = self.num_sinks + self.num_kept
        return held + query_length, self.seen - held

    def get_seq_length(self) -> int:
        """Tokens seen, those that were evicted among them."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: a stream has no end."""
        return -1

    def reset(self) -> None:
        """Back to an empty cache."""
        self.keys = self.values = self.sink_keys = self.sink_values = None
        self.is_initialized = False
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: evicted tokens do not come back."""
        if tokens_to_remove:
            raise InputError(
                f"{abs(tokens_to_remove)} tokens cannot be taken back from a sink cache; assisted generation needs that"
            )

    def _select(self, select: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "sink_keys", "sink_values"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, select(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the items, for beam search."""
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every item."""
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some items."""
        self._select(lambda x: x[indices.to(x.device)])


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
        InputError: if a number is out of range, or the model's rotary embedding or its own window does not allow it.

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


def _run_of_items(x: Tensor, starts: Sequence[int], count: int) -> Tensor:
    """``count`` tokens of ``x`` ``[B, H, N, D]`` from each item's own start, or from one of all."""
    if len(set(starts)) == 1:
        return x[:, :, starts[0] : starts[0] + count].clone()
    return torch.stack([item[:, start : start + count] for item, start in zip(x, starts, strict=True)])
