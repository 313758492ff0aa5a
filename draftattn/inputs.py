"""What a mask policy looks at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from draftattn.kernels.api import BlockMeans
from draftattn.kernels.pooling import PooledBlocks, PoolRequest, pool_together
from draftattn.kernels.weighted_pooling import pool_weighted
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
    _weighted: dict[float | None, BlockMeans] = field(default_factory=dict, init=False, repr=False)

    @property
    def key_offsets(self) -> Tensor:
        """Boundaries of the key blocks, per item where text lengths differ: ``[N + 1]`` or ``[B, N + 1]``."""
        if not self._key_offsets:
            self._key_offsets.append(self.layout.key_offsets(self.text_lengths))
        return self._key_offsets[0]

    @property
    def mean_query(self) -> Tensor:
        """float32 ``[B, N, H, D]``."""
        if "query" not in self._pooled:
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

    def weighted_means(self, scale: float | None = None) -> BlockMeans:
        r"""Mean keys and values in which a token counts by what the mean query of the video would give it.

        What a skipped block adds to a row is :math:`\sum_{j \in b} e^{q \cdot k_j} v_j`, and plain means are its first
        order in :math:`q` around zero. Queries of a head share a large part, their mean :math:`\bar q`; around that
        point the first order is :math:`e^{q \cdot \tilde k_b} \tilde v_b` with means weighted by
        :math:`e^{\bar q \cdot k_j}`. Same columns and same kernel; only the pooling differs.

        Args:
            scale: factor of the scores, ``D ** -0.5`` if None.

        Returns:
            ``[B, N, H_kv, D]`` in the dtype of the tensors; query heads that share a key head share their mean.
        """
        if scale not in self._weighted:
            if "query" not in self._pooled:
                self.pool("query")
            layout, key_heads = self.layout, self.key.shape[2]
            group = self.query.shape[2] // key_heads
            factor = self.query.shape[-1] ** -0.5 if scale is None else scale
            means = self._pooled["query"].mean[:, : layout.num_video_blocks]
            # the mean over tokens and a group's heads, times the scale
            weights = (layout.video_block_sizes * (factor / (group * layout.grid.num_tokens))).to(means.dtype)
            # a product of [B, 1, V] and [B, V, H · D]
            direction = weights.expand(len(means), 1, -1).bmm(means.flatten(2))
            direction = direction.view(-1, key_heads, group, self.query.shape[-1]).sum(2)
            pooled = pool_weighted(self.key, self.value, direction, self.key_offsets, layout.block_size)
            self._weighted[scale] = BlockMeans(*pooled)
        return self._weighted[scale]

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
