"""How much of causal attention a mask computes."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.block_mask import BlockMask


def causal_pairs(num_queries: int, num_keys: int) -> int:
    """Pairs of a query and a key it sees, where the last query stands at the last key.

    >>> causal_pairs(3, 3), causal_pairs(1, 5), causal_pairs(2, 5)
    (6, 5, 9)
    """
    return num_queries * num_keys - num_queries * (num_queries - 1) // 2


def computed_pairs(mask: BlockMask, num_queries: int, num_keys: int) -> Tensor:
    """Pairs of a query and a key it sees in the chosen blocks of a mask, for a causal call.

    What a window's rule hides inside chosen blocks counts as computed. Never waits for the device.

    Args:
        mask: the mask; query shifts are honoured.
        num_queries: queries of the call.
        num_keys: keys of the call.

    Returns:
        float64 scalar, the mean over batch items and heads of the mask.

    >>> offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> everything = BlockMask.from_block_map(torch.ones(1, 1, 2, 2, dtype=torch.bool), offsets, offsets)
    >>> computed_pairs(everything, 3, 3).item()
    6.0
    """
    shifts = mask.query_shifts
    shift = num_keys - num_queries if shifts is None else torch.atleast_2d(shifts)[:, None].long()
    # [B | 1, 1, Q], key positions of the first query of each block and past the last one
    first = mask.query_offsets[:-1].long() + shift
    end = mask.query_offsets[1:].long() + shift
    first, end = (torch.as_tensor(x).reshape(-1, 1, mask.num_query_blocks, 1) for x in (first, end))
    offsets = torch.atleast_2d(mask.key_offsets).long()
    ids = mask.kv_indices.long()
    batch = max(len(ids), len(offsets))
    ids = ids.expand(batch, -1, -1, -1)
    starts, ends = (
        x.expand(batch, -1).gather(1, ids.flatten(1)).view(ids.shape) for x in (offsets[:, :-1], offsets[:, 1:])
    )
    used = torch.arange(ids.shape[-1], device=ids.device) < mask.kv_num_blocks[..., None]

    def seen_from(position: Tensor) -> Tensor:
        """Keys from a position on that the queries of a block see, summed over its queries."""
        return _triangle(end - position) - _triangle(first - position)

    pairs = torch.where(used, seen_from(starts) - seen_from(ends), 0)
    return pairs.double().sum((-1, -2)).mean()


def _triangle(n: Tensor) -> Tensor:
    n = n.clamp(min=0)
    return n * (n + 1) // 2


class DensityRecorder:
    """Share of causal pairs that the served calls of each layer computed. Waits for the device only when read.

    ``enabled`` may be set to False to count no more, as timed runs do.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._computed: dict[int, Tensor | float] = {}
        self._all: dict[int, int] = {}

    def record(self, layer: int, mask: BlockMask, num_queries: int, num_keys: int, batch: int) -> None:
        """Adds a call over ``batch`` sequences, with its mask."""
        if self.enabled:
            self.add(layer, computed_pairs(mask, num_queries, num_keys) * batch, num_queries, num_keys, batch)

    def record_dense(self, layer: int, num_queries: int, num_keys: int, batch: int) -> None:
        """Adds a call that was computed densely."""
        self.add(layer, float(causal_pairs(num_queries, num_keys) * batch), num_queries, num_keys, batch)

    def add(self, layer: int, computed: Tensor | float, num_queries: int, num_keys: int, batch: int) -> None:
        """Adds a call with the pairs it computed, summed over its batch and averaged over heads."""
        if not self.enabled:
            return
        self._computed[layer] = self._computed.get(layer, 0.0) + computed
        self._all[layer] = self._all.get(layer, 0) + causal_pairs(num_queries, num_keys) * batch

    def by_layer(self) -> dict[int, float]:
        """Density of each layer that was called."""
        return {layer: float(computed) / self._all[layer] for layer, computed in sorted(self._computed.items())}

    def density(self) -> float | None:
        """Density over all layers; None before any call."""
        total = sum(self._all.values())
        return float(sum(float(computed) for computed in self._computed.values())) / total if total else None

    def reset(self) -> None:
        """Forgets the calls so far."""
        self._computed.clear()
        self._all.clear()
