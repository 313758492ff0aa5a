"""StreamingLLM: endless text in constant memory, by attention sinks and a window."""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from draftattn.errors import InputError
from draftattn.pipelines.llm.apply import apply, attention_layers
from draftattn.pipelines.llm.attention import token_ranges
from draftattn.pipelines.llm.dense import single_query_attention
from draftattn.pipelines.llm.ranges import TokenRanges
from draftattn.pipelines.llm.streaming_attention import streaming_attention
from draftattn.pipelines.llm.streaming_cache import SinkCache
from draftattn.pipelines.llm.streaming_config import StreamingConfig, check_own_window
from draftattn.pipelines.llm.streaming_layer import SinkLayer, Stream
from draftattn.pipelines.llm.streaming_rotary import rotary_turn
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem, SystemConfig

__all__ = ["AutoModelForCausalLM", "SinkCache", "Streaming", "StreamingConfig"]


class Streaming(AttentionSystem):
    """``apply(model, "streaming", sink=4, window=1020)``. Source: StreamingLLM, arXiv 2309.17453.

    Every token attends to the first ``sink`` tokens, the ``window`` before it and itself, whether it comes alone, in a
    prompt of any length, or in a chunk. Forward passes and ``generate`` make a `SinkCache` where they would have made
    transformers' dynamic cache.
    """

    name: ClassVar[str] = "streaming"
    config_class: ClassVar[type[SystemConfig]] = StreamingConfig
    sparse_decode: ClassVar[bool] = True

    def __init__(self, config: StreamingConfig) -> None:
        super().__init__(config)
        self._hooks: list[Any] = []
        self._cache: SinkCache | None = None
        self._stream: Stream | None = None

    def attach(self, model: nn.Module, layers: dict[int, nn.Module]) -> None:
        """Lets the model's decoder take a sink cache."""
        assert isinstance(model, PreTrainedModel)
        if len(layers) != len(attention_layers(model)):
            raise InputError("streaming must serve all layers of a model")
        check_own_window(model, self.config)
        new_stream = functools.partial(Stream, self.config, rotary_turn(model))
        enter = _Enter(self, new_stream, len(layers))
        self._hooks += [
            model.base_model.register_forward_pre_hook(enter, with_kwargs=True),
            model.base_model.register_forward_hook(self._leave, always_call=True),
        ]

    def detach(self) -> None:
        """Takes the hooks out."""
        while self._hooks:
            self._hooks.pop().remove()
        self._cache = self._stream = None

    def enter(self, cache: SinkCache | None, stream: Stream) -> None:
        """Begins a forward pass with a cache, or without."""
        self._cache, self._stream = cache, stream
        stream.masked = True

    def _leave(self, *of_hook: Any) -> None:
        if self._stream is not None:
            self._stream.masked = False
        self._cache = self._stream = None

    def mask(self, request: dict[str, Any]) -> Any:
        """Nothing: what a token sees follows from the cache."""
        if not isinstance(token_ranges(**{**request, "attention_mask": None, "kv_offset": 0}), TokenRanges):
            raise InputError("streaming got packed sequences or a mask of its own; allowed is a 2-D attention_mask")

    def attend(self, call: AttentionCall) -> Tensor:
        """Not reached: `forward` is replaced, for the keys do not stand at their positions."""
        raise AssertionError(call)

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: TokenRanges | Tensor | None,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """See `AttentionSystem.forward`; the keys are what the sink cache gave."""
        del sliding_window  # checked to be larger than all that is kept
        if mask is not None:
            raise InputError("streaming got a mask of its own; allowed is a 2-D attention_mask of padding")
        stream, length = self._stream, query.shape[2]
        if stream is None:
            raise InputError("streaming serves attention inside the model it was applied to only")
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        cached = None if self._cache is None else self._cache.layers[layer]
        assert cached is None or isinstance(cached, SinkLayer)
        seen = 0 if cached is None else cached.seen - length
        num_sinks = key.shape[2] - length - min(seen, self.config.window)
        self._record(layer, seen, length, query.shape[0])
        if length == 1:
            mask = _all_but(_hidden(stream, seen, key.shape[2]), key.shape[2], key.device)
            return single_query_attention(query, key, value, scale, mask)
        return streaming_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            self.config,
            stream.turn,
            seen=seen,
            num_sinks=num_sinks,
            padding=stream.padding,
            scale=scale,
        )

    def _record(self, layer: int, seen: int, length: int, batch: int) -> None:
        if self.recorder is None:
            return
        assert self._stream is not None
        for padding in self._stream.padding or (0,) * batch:
            first, end = max(0, seen - padding), max(0, seen + length - padding)
            limit = self.config.size + 1
            whole = max(0, min(end, limit) - first)  # queries that see all of their text
            computed = whole * (2 * first + whole + 1) // 2 + (end - first - whole) * limit
            self.recorder.add(layer, float(computed), end - first, end, 1)


class _Enter:
    """Hook of a decoder: gives it a sink cache, and tells the system of it and of the padding."""

    def __init__(self, system: Streaming, new_stream: functools.partial[Stream], num_layers: int) -> None:
        self.system, self.new_stream, self.num_layers = system, new_stream, num_layers

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            names = [name for name in inspect.signature(module.forward).parameters if name != "self"]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        use_cache = kwargs.get("use_cache")
        use_cache = module.config.use_cache if use_cache is None else use_cache  # type: ignore[union-attr]
        cache = self._cache_for(kwargs.get("past_key_values"), bool(use_cache))
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
            raise InputError("streaming got a mask of its own; allowed is a 2-D attention_mask of padding")
        if cache is None:
            # one that is never filled: it reads the mask and knows the padding
            stream = SinkCache.of_stream(self.new_stream(), 0, attention_mask).stream
        else:
            stream, seen = cache.stream, cache.get_seq_length()
            # of an item that was nothing but padding so far, more may follow
            if attention_mask is not None and (not seen or seen in (stream.padding or ())):
                cache.set_padding(attention_mask)
            kwargs["past_key_values"] = cache
        self.system.enter(cache, stream)
        return (), kwargs

    def _cache_for(self, given: Any, use_cache: bool) -> SinkCache | None:
        if isinstance(given, SinkCache):
            if given.stream.config != self.system.config:
                config = given.stream.config
                raise InputError(
                    f"the cache has sink {config.sink} and window {config.window}, streaming was applied with "
                    f"{self.system.config.sink} and {self.system.config.window}; they must agree"
                )
            return given
        if given is None:
            return SinkCache.of_stream(self.new_stream(), self.num_layers) if use_cache else None
        if type(given) is DynamicCache and not given.get_seq_length() and not given.offloading:
            return SinkCache.of_stream(self.new_stream(), self.num_layers)
        raise InputError(
            f"past_key_values is a {type(given).__name__} of {given.get_seq_length()} tokens; streaming takes a "
            "SinkCache, an empty DynamicCache or none"
        )


class AutoModelForCausalLM:
    """``transformers.AutoModelForCausalLM`` whose models stream, in the manner of the package attention_sinks.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> model = AutoModelForCausalLM.from_config(config, attention_sink_size=4, attention_sink_window_size=12)
    >>> prompt = torch.randint(1, 32, (1, 100))
    >>> tokens = model.generate(
    ...     prompt, max_new_tokens=8, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True
    ... )
    >>> tokens.sequences.shape[1], tokens.past_key_values.num_held
    (108, 16)
    """

    def __init__(self) -> None:
        raise OSError("AutoModelForCausalLM is made by from_pretrained(...) or from_config(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        attention_sink_size: int = 4,
        attention_sink_window_size: int = 1020,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """As transformers' method of this name, which takes all other arguments.

        Args:
            pretrained_model_name_or_path: hub id or folder.
            model_args: see transformers.
            attention_sink_size: leading tokens that every token sees.
            attention_sink_window_size: tokens before a token that it sees.
            kwargs: see transformers.

        Raises:
            InputError: if a size is out of range or the model cannot stream.
        """
        config = StreamingConfig(sink=attention_sink_size, window=attention_sink_window_size)
        return _streaming(
            transformers.AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs),
            config,
        )

    @classmethod
    def from_config(
        cls, config: Any, *, attention_sink_size: int = 4, attention_sink_window_size: int = 1020, **kwargs: Any
    ) -> PreTrainedModel:
        """As transformers' method of this name: random weights. For the rest see `from_pretrained`."""
        streaming = StreamingConfig(sink=attention_sink_size, window=attention_sink_window_size)
        return _streaming(transformers.AutoModelForCausalLM.from_config(config, **kwargs), streaming)


def _streaming(model: PreTrainedModel, config: StreamingConfig) -> PreTrainedModel:
    apply(model, Streaming(config))
    return model


def _hidden(stream: Stream, seen: int, num_keys: int) -> tuple[int, ...]:
    """Keys of every item, from the left, that are padding when one token comes after ``seen``."""
    # padding itself sees itself: a row without keys would be NaN in some kernels
    return tuple(min(num_keys - 1, max(0, before - (seen + 1 - num_keys))) for before in stream.padding or (0,))


def _all_but(hidden: tuple[int, ...], num_keys: int, device: torch.device) -> Tensor | None:
    """Bool ``[B, 1, 1, K]`` without so many keys from the left; None where nothing is hidden."""
    if not any(hidden):
        return None
    return torch.arange(num_keys, device=device) >= torch.tensor(hidden, device=device)[:, None, None, None]
