"""Cache layers that remember more than keys and values, in the caches that transformers makes by itself."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from draftattn.errors import InputError

Layer = TypeVar("Layer", bound=DynamicLayer)


def check_model(model: Any) -> None:
    """Raises `InputError` for what is no model of transformers, such as its configuration."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model is a {type(model).__name__}; it must be a model of transformers")


def adopt_layer(cache: Any, layer: int, kind: type[Layer], *arguments: Any) -> Layer | None:
    """The layer of a cache, replaced by one of ``kind`` if it is a plain growing one that is still empty.

    Args:
        cache: what a layer was called with; None for none.
        layer: number of the layer.
        kind: class of the wanted layer.
        arguments: for ``kind``.

    Returns:
        The layer, or None if there is no cache, or its layer is of another kind.

    >>> from transformers import DynamicCache
    >>> class Counting(DynamicLayer):
    ...     updates = 0
    >>> cache = DynamicCache()
    >>> adopt_layer(cache, 1, Counting) is cache.layers[1]
    True
    """
    if not isinstance(cache, Cache):
        return None
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if layer >= len(cache.layers):
        return None
    found = cache.layers[layer]
    if type(found) is DynamicLayer and not found.is_initialized:
        found = cache.layers[layer] = kind(*arguments)
    return found if isinstance(found, kind) else None
