"""A transformer cut to its first blocks, which costs a small part of a pass at the same size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# The lists of repeated blocks of the transformers we know.
BLOCK_LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks")


def block_counts(transformer: Any) -> dict[str, int]:
    """How many blocks each list of a transformer holds.

    >>> from diffusers import WanTransformer3DModel
    >>> block_counts(WanTransformer3DModel(num_attention_heads=1, attention_head_dim=8, text_dim=8, freq_dim=8,
    ...     ffn_dim=8, num_layers=3))
    {'blocks': 3}
    """
    return {
        name: len(blocks)
        for name in BLOCK_LISTS
        if isinstance(blocks := getattr(transformer, name, None), nn.ModuleList)
    }


@contextmanager
def first_blocks(transformer: Any, counts: dict[str, int] | int) -> Iterator[Any]:
    """The transformer with only the first blocks of each list, until the context ends.

    Args:
        transformer: the model; draft attention must be off when the context begins and when it ends.
        counts: blocks to keep, for each list or for all alike.
    """
    whole = {name: getattr(transformer, name) for name in block_counts(transformer)}
    try:
        for name, blocks in whole.items():
            count = counts if isinstance(counts, int) else counts[name]
            setattr(transformer, name, nn.ModuleList(list(blocks)[:count]))
        yield transformer
    finally:
        for name, blocks in whole.items():
            setattr(transformer, name, blocks)
