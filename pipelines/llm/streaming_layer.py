"""One layer of the cache of constant size: sinks, and the window of the last tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from draftattn.errors import InputError
from draftattn.kernels.rotary import turn_pairs
from draftattn.pipelines.llm.streaming_config import StreamingConfig
from draftattn.pipelines.llm.streaming_ring import Ring
from draftattn.pipelines.llm.streaming_rotary import RotaryTurn


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

    def angles(self, seen: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[B | 1, 1, 1, r]`` that turn the sinks to where the token after ``seen`` sees them."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return self.turn.angles_of_items(self.evicted(seen), like.device, dtype)


class SinkLayer(CacheLayerMixin):
    """The cache of one layer: sinks, turned when they are read, and the window as it came.

    ``keys`` and ``values`` are the window, ``[B, H_kv, <= window, D]``; of items with left padding, sinks stand at the
    end of their places until all are taken. Once every item has filled all places, tokens that come one by one are kept
    in a `Ring`, and reading ``keys`` or ``values`` puts the window in order again.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, stream: Stream) -> None:
        self._ring: Ring | None = None
        super().__init__()
        self.stream = stream
        self.seen = 0
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The keys of the window."""
        self._unroll()
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._unroll()
        self._keys = keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The values of the window."""
        self._unroll()
        return self._values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._unroll()
        self._values = values

    def _unroll(self) -> None:
        if self._ring is not None:
            ring, self._ring = self._ring, None
            self._keys, self._values = ring.window()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty tensors of the right kind."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # views would keep the first tokens alive
        self.keys, self.sink_keys = key_states[:, :, :0].clone(), key_states[:, :, :0].clone()
        self.values, self.sink_values = value_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    @torch.compiler.disable  # which token comes is known to the host alone
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of new tokens, ``[B, H_kv, N, D]``.

        Returns:
            Keys and values that the new tokens see: sinks, at their places for the first of them, window, new ones. Of
            a single token that sees all of them, in any order, and only until the next call.

        Raises:
            InputError: if some of several new tokens must not see what others do, and the attention cannot hide it.
        """
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states)
        if key_states.shape[2] == 1 and self._is_full():
            ring = self._usable_ring()
            if ring is not None:
                angles = self.stream.angles(self.seen, key_states)
                self.seen += 1
                return ring.step(key_states, value_states, *angles)
        keys, values = self._read(key_states, value_states)
        self._keep(keys, values)
        return keys, values

    def _is_full(self) -> bool:
        """Whether the window and all places of sinks are taken by tokens of every item."""
        return self.seen - max(self.stream.padding or (0,)) >= self.stream.config.size

    def _usable_ring(self) -> Ring | None:
        if self._ring is not None and not self._ring.usable:
            self._unroll()
        if self._ring is None and not torch.is_grad_enabled():
            assert self.sink_keys is not None
            assert self.sink_values is not None
            assert self._keys is not None
            assert self._values is not None
            half = self.stream.turn.half
            self._ring = Ring.of(self.sink_keys, self.sink_values, self._keys, self._values, half)
            self._keys = self._values = None
        return self._ring

    def _read(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Sinks, window and new tokens in one piece."""
        assert self.keys is not None
        assert self.values is not None
        assert self.sink_keys is not None
        assert self.sink_values is not None
        if not self.keys.shape[2]:
            return key_states, value_states
        turned = self.sink_keys
        if turned.shape[2] and any(self.stream.evicted(self.seen)):
            turned = turn_pairs(turned, *self.stream.angles(self.seen, turned))
        keys = torch.cat([turned, self.keys, key_states], dim=2)
        return keys, torch.cat([self.sink_values, self.values, value_states], dim=2)

    def _check(self, key_states: Tensor) -> None:
        stream, count = self.stream, key_states.shape[2]
        if self.seen and stream.closed:
            raise InputError(stream.closed)
        for held in (self.sink_keys, stream.padding):
            if held is not None and len(held) != len(key_states):
                raise InputError(
                    f"the batch has {len(key_states)} items and the cache is for {len(held)}; use a new cache"
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
        most_padding = max(self.stream.padding or (0,))
        if leaving and first_kept - most_padding < sink:  # some item has places left
            # no token after these can become a sink
            taken = num_sinks + min(leaving, sink + most_padding)
            starts = self._first_sinks(num_sinks, taken, first_kept)
            unturned = keys[:, :, :taken]
            if num_sinks:
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
        if self._ring is not None:
            return self.stream.config.window
        return 0 if self._keys is None else self._keys.shape[2]

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
        self._ring = None
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
        if self._ring is not None:
            self._ring = self._ring.select(select)
        for name in ("_keys", "_values", "sink_keys", "sink_values"):
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


def _run_of_items(x: Tensor, starts: Sequence[int], count: int) -> Tensor:
    """``count`` tokens of ``x`` ``[B, H, N, D]`` from each item's own start, or from one of all."""
    if len(set(starts)) == 1:
        return x[:, :, starts[0] : starts[0] + count].clone()
    return torch.stack([item[:, start : start + count] for item, start in zip(x, starts, strict=True)])
