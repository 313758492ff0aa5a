"""Which tokens of a padded batch are real, and where the queries of a call stand among the keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ItemGroup(NamedTuple):
    """Batch items whose real tokens are the same positions: what one unpadded call serves.

    Args:
        items: their batch indices; None for the whole batch.
        first: position of their first real key.
        end: position past their last real key.
    """

    items: tuple[int, ...] | None
    first: int
    end: int


@dataclass(frozen=True, eq=False)
class TokenRanges:
    """What our mask function hands to every layer of a forward pass, in place of an N×N mask.

    Positions count from the first key of the padded batch. It knows each item's real tokens as a range on the host,
    found with one wait for the device per forward pass, and only where an attention mask with padding is given.

    Args:
        num_queries: queries of the call.
        num_keys: keys up to the last query; a static cache may hold more, which nothing sees.
        ranges: ``(first, end)`` of each item's real keys; None where all keys of all items are real.
        padding: bool ``[B, num_keys]``, true for real keys; None where all are.
        gaps: the first item whose real keys are not one range, or None.
        window: a query at ``p`` sees only the keys ``j > p - window``; None for all.

    >>> mask = torch.tensor([[False, True, True, True], [True, True, True, True]])
    >>> ranges = TokenRanges.of(2, num_queries=4, num_keys=4, attention_mask=mask)
    >>> ranges.groups()
    [ItemGroup(items=(0,), first=1, end=4), ItemGroup(items=(1,), first=0, end=4)]
    """

    num_queries: int
    num_keys: int
    ranges: tuple[tuple[int, int], ...] | None = None
    padding: Tensor | None = None
    gaps: int | None = None
    window: int | None = None

    # transformers hands a mask that it made early, for a static cache, back to the mask functions, asking for these
    ndim = 4

    def contiguous(self) -> TokenRanges:
        """Itself."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> TokenRanges:
        """The same, with the padding mask moved; accepts what ``Tensor.to`` does but a dtype."""
        if self.padding is None:
            return self
        return replace(self, padding=self.padding.to(*args, **kwargs))

    @property
    def query_offset(self) -> int:
        """Position of the first query."""
        return self.num_keys - self.num_queries

    @classmethod
    def of(
        cls,
        batch: int,
        num_queries: int,
        num_keys: int,
        attention_mask: Tensor | None = None,
        window: int | None = None,
    ) -> TokenRanges:
        """Reads a 2-D padding mask ``[B, >= num_keys]``; none means that all tokens are real."""
        everything = cls(num_queries, num_keys, window=window)
        if attention_mask is None:
            return everything
        padding = attention_mask[:, :num_keys].bool()
        if padding.shape[1] < num_keys:  # positions that a mask does not reach are not attended to
            padding = torch.nn.functional.pad(padding, (0, num_keys - padding.shape[1]))
        padding = padding.expand(batch, -1)
        first = padding.int().argmax(-1)
        last = num_keys - padding.flip(-1).int().argmax(-1)
        # one wait for the device, for all that the host must know
        found: Sequence[Sequence[int]] = torch.stack([first, last, padding.sum(-1)], dim=-1).tolist()
        if all(count == num_keys for _, _, count in found):
            return everything
        ranges = tuple((start, end) if count else (0, 0) for start, end, count in found)
        gaps = next((i for i, (start, end, count) in enumerate(found) if count and count != end - start), None)
        return replace(everything, ranges=ranges, padding=padding, gaps=gaps)

    def groups(self) -> list[ItemGroup]:
        """The batch in groups of items with the same range; items without tokens are left out."""
        if self.ranges is None:
            return [ItemGroup(None, 0, self.num_keys)]
        found: dict[tuple[int, int], list[int]] = {}
        for item, limits in enumerate(self.ranges):
            if limits[0] < limits[1]:
                found.setdefault(limits, []).append(item)
        whole = len(found) == 1 and sum(map(len, found.values())) == len(self.ranges)
        return [ItemGroup(None if whole else tuple(items), *limits) for limits, items in found.items()]
