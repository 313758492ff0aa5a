"""A cache layer that keeps compressed keys and values beside the plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

Items = tuple[int, ...] | None


class NSALayer(DynamicLayer):
    """A growing cache of one layer, with what Native Sparse Attention made of its whole blocks.

    Each batch item has a number of compressed blocks of its own, for left padding shifts its blocks. Beam search,
    cropping and selecting items carry the compressed ones along.
    """

    def __init__(self) -> None:
        super().__init__()
        # [B, C, H_kv, D]; of item b the first `filled[b]` blocks are valid
        self.compressed: tuple[Tensor, Tensor] | None = None
        self.filled: list[int] = []

    def stored(self, items: Items, most: int) -> tuple[int, tuple[Tensor, Tensor] | None]:
        """How many leading blocks of some items are valid, at most ``most``, and these: ``[B', count, H_kv, D]``."""
        if self.compressed is None:
            return 0, None
        count = min(most, *(self.filled if items is None else (self.filled[item] for item in items)))
        key, value = (x if items is None else x[list(items)] for x in self.compressed)
        return count, (key[:, :count], value[:, :count])

    def store(self, items: Items, batch: int, first: int, blocks: tuple[Tensor, Tensor]) -> None:
        """Puts blocks of some items, ``[B', n, H_kv, D]``, behind their first ``first`` ones."""
        count = first + blocks[0].shape[1]
        if self.compressed is None:
            empty = blocks[0].new_empty(batch, 0, *blocks[0].shape[2:])
            self.compressed, self.filled = (empty, empty), [0] * batch
        room = self.compressed[0].shape[1]
        if count > room:
            # in steps, so that decoding seldom copies
            more = max(64, count - room)
            key, value = (torch.cat([x, x.new_zeros(batch, more, *x.shape[2:])], 1) for x in self.compressed)
            self.compressed = key, value
        rows: Any = slice(None) if items is None else list(items)
        for place, new in zip(self.compressed, blocks, strict=True):
            place[rows, first:count] = new
        for item in range(batch) if items is None else items:
            self.filled[item] = count

    def _select(self, index: Tensor) -> None:
        if self.compressed is not None:
            key, value = (x.index_select(0, index.to(x.device)) for x in self.compressed)
            self.compressed, self.filled = (key, value), [self.filled[i] for i in index.tolist()]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes other items, for beam search."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every item."""
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.filled)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some items."""
        super().batch_select_indices(indices)
        self._select(torch.arange(len(self.filled), device=indices.device)[indices])

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.compressed, self.filled = None, []
