"""What a mask policy looks at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from draftattn.kernels.api import BlockMeans
from draftattn.kernels.pooling import PooledBlocks, PoolRequest, pool_together
from draftattn.layout import BlockLayout

Pooled = Literal["query", "key", "value"]


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Query, key and value of one self-attention call in blocked token order, with their block means on demand.

    Args:
        query: ``[B, S, H, D]``, video tokens first, after rotary embedding.
        key: ``[B, S, H_kv, D]``.
        value: ``[B, S, H_kv, D]``.
        layout: the blocks of the sequence.
        text_lengths: ``[B]`` valid text tokens per item, or None where all are valid.

    The means are pooled once and shared by the policy and the residual. Whoever knows what will be needed says so to
    `pool`, for on a GPU tensors that are pooled together take one launch.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: BlockLayout
    text_lengths: Tensor | None = None
    _key_offsets: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _pooled: dict[str, PooledBlocks] = field(default_factory=dict, init=False, repr=False)

    @property
    def key_offsets(self) -> Tensor:
        """Boundaries of the key blocks, per item where text lengths differ: ``[N + 1]`` or ``[B, N + 1]``."""
        if not self._key_offsets:
            self._key_offsets.append(self.layout.key_offsets(self.text_lengths))
        return self._key_offsets[0]

    @property
    def mean_query(self) -> Tensor:
        """float32 ``[B, N, H, D]``."""
        self.pool("query", "key")
        return self._pooled["query"].mean

    @property
    def mean_key(self) -> Tensor:
        """float32 ``[B, N, H_kv, D]``."""
        self.pool("key")
        return self._pooled["key"].mean

    @property
    def mean_value(self) -> Tensor:
        """float32 ``[B, N, H_kv, D]``."""
        self.pool("value")
        return self._pooled["value"].mean

    @property
    def block_means(self) -> BlockMeans:
        """Mean keys and values in the dtype of the tensors, which the residual takes."""
        self.pool("key", "value")
        key, value = (self._pooled[name].rounded for name in ("key", "value"))
        assert value is not None
        return BlockMeans(self.mean_key.to(value.dtype) if key is None else key, value)

    def pool(self, *names: Pooled) -> None:
        """Pools what is named and not yet pooled, all together.

        Values are pooled for the residual, so that keys pooled with them are made in its dtype too.
        """
        missing = [name for name in names if name not in self._pooled]
        if not missing:
            return
        for_residual = {"query": False, "key": "value" in missing, "value": True}
        requests = [
            PoolRequest(
                getattr(self, name),
                self.layout.offsets if name == "query" else self.key_offsets,
                rounded=for_residual[name],
            )
            for name in missing
        ]
        self._pooled.update(zip(missing, pool_together(requests, self.layout.block_size), strict=True))
