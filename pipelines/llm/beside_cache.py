"""What a system keeps beside a model's cache, for as long as the cache is as the model's layers left it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from draftattn.pipelines.llm.system import AttentionCall

Items = tuple[int, ...] | None


class Kept(Protocol):
    """Anything made of the leading keys of a text."""

    @property
    def num_tokens(self) -> int:
        """How many of them."""
        ...


T = TypeVar("T", bound=Kept)


class BesideCache(Generic[T]):
    """Keeps something for every cache, layer and group of batch items, from one call of a layer to its next.

    What the layer's last call with a cache put down is handed out once, if the cache still holds the keys that this
    call left there. A cache that was reordered for beams, cropped, emptied, moved or copied since, or that another
    model filled, has nothing beside it: what is needed must be made again from its keys. Caches are held weakly, and
    any number of them may be used in turn.

    Args:
        layers: attention modules by layer, which are hooked.
    """

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        self._records: weakref.WeakKeyDictionary[Any, dict[int, _Record[T]]] = weakref.WeakKeyDictionary()
        self._ready: dict[int, dict[Items, T]] = {}  # what the call of a layer that runs now may take
        self._hooks = [
            module.register_forward_pre_hook(_Before(self, layer), with_kwargs=True) for layer, module in layers.items()
        ]

    def close(self) -> None:
        """Takes the hooks out and forgets everything."""
        while self._hooks:
            self._hooks.pop().remove()
        self._records.clear()
        self._ready.clear()

    def take(self, call: AttentionCall) -> T | None:
        """What was kept of the keys before a call's own, all of them and no more; None if there is no such thing.

        It is the caller's from now on, to be extended by the call's keys and given back through `put`.
        """
        kept = self._ready.get(call.layer, {}).pop(call.items, None)
        return kept if kept is not None and 0 < kept.num_tokens == call.query_offset else None

    def put(self, call: AttentionCall, kept: T) -> None:
        """Keeps something made of all keys of a call; nothing happens where the call has no cache."""
        keys = _keys_of(call.cache, call.layer)
        if keys is None:
            return
        records = self._records.setdefault(call.cache, {})
        record = records.get(call.layer)
        if record is None or not record.describes(keys):
            record = records[call.layer] = _Record(weakref.ref(keys), _version(keys))
        record.kept[call.items] = kept

    def before(self, layer: int, cache: Any) -> None:
        """A layer begins: what its last call left is its own now, and what it does not put down again is forgotten."""
        self._ready.pop(layer, None)
        record = None if cache is None else self._records.get(cache, {}).pop(layer, None)
        if record is not None and record.describes(_keys_of(cache, layer)):
            self._ready[layer] = record.kept


@dataclass
class _Record(Generic[T]):
    """What a call of a layer kept, and the keys that it left in the cache."""

    keys: weakref.ref[Tensor]
    version: int | None
    kept: dict[Items, T] = field(default_factory=dict)

    def describes(self, keys: Tensor | None) -> bool:
        return keys is not None and self.keys() is keys and self.version == _version(keys)


@dataclass(frozen=True)
class _Before:
    owner: BesideCache[Any]
    layer: int

    @torch.compiler.disable  # weak references; compiled models break their graph at attention anyway
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.owner.before(self.layer, kwargs.get("past_key_values"))


def _version(keys: Tensor) -> int | None:
    """Counts changes in place, as a static cache makes them; tensors of inference mode do not count theirs."""
    return None if keys.is_inference() else keys._version


def _keys_of(cache: Any, layer: int) -> Tensor | None:
    layers = getattr(cache, "layers", ())
    return getattr(layers[layer], "keys", None) if layer < len(layers) else None
