"""What a mask policy looks at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from draftattn.kernels.pooling import pool_blocks
from draftattn.layout import BlockLayout


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Query, key and value of one self-attention call in blocked token order, with their block means on demand.

    Args:
        query: ``[B, S, H, D]``, video tokens first, after rotary embedding.
        key: ``[B, S, H_kv, D]``.
        value: ``[B, S, H_kv, D]``.
        layout: the blocks of the sequence.
        text_lengths: ``[B]`` valid text tokens per item, or None where all are valid.

    The means are pooled once and shared by the policy and the residual.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: BlockLayout
    text_lengths: Tensor | None = None

    @cached_property
    def key_offsets(self) -> Tensor:
        """Boundaries of the key blocks, per item where text lengths differ: ``[N + 1]`` or ``[B, N + 1]``."""
        return self.layout.key_offsets(self.text_lengths)

    @cached_property
    def mean_query(self) -> Tensor:
        """float32 ``[B, N, H, D]``."""
        return pool_blocks(self.query, self.layout.offsets, self.layout.block_size)

    @cached_property
    def mean_key(self) -> Tensor:
        """float32 ``[B, N, H_kv, D]``."""
        return pool_blocks(self.key, self.key_offsets, self.layout.block_size)

    @cached_property
    def mean_value(self) -> Tensor:
        """float32 ``[B, N, H_kv, D]``."""
        return pool_blocks(self.value, self.key_offsets, self.layout.block_size)
