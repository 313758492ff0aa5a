"""What a mask policy for causal sequences looks at."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.pooling import PoolRequest, pool_together
from draftattn.policy import CallContext


def even_offsets(length: int, block_size: int, device: torch.device | str) -> Tensor:
    """Boundaries of blocks of one size, the last of them ragged: int32 ``[ceil(length / block_size) + 1]``.

    >>> even_offsets(10, 4, "cpu").tolist()
    [0, 4, 8, 10]
    """
    return _even_offsets(length, block_size, torch.device(device)).clone()


@functools.lru_cache(maxsize=64, typed=True)  # 64.0 must not take the place of 64
@torch.inference_mode(False)  # a kept inference tensor would break later autograd
def _even_offsets(length: int, block_size: int, device: torch.device) -> Tensor:
    count = -(-length // block_size)
    steps = torch.arange(count + 1, dtype=torch.int32, device=device) * block_size
    return steps.clamp_(max=length)


def check_block_size(block_size: int) -> None:
    """Raises `InputError` unless kernels take blocks of this size."""
    if not 16 <= block_size <= 128:
        raise InputError(f"block_size is {block_size}; it must be 16 to 128")


@dataclass(frozen=True, eq=False)
class CausalInputs:
    """Query and key of one causal attention call, cut into blocks, with their block means on demand.

    The counterpart of `draftattn.inputs.AttentionInputs` for a sequence without a grid. Key blocks begin at key 0.
    Query blocks are cut at the same places: where cached keys come first, the first query block may be ragged.

    Args:
        query: ``[B, N, H, D]``, after rotary embedding.
        key: ``[B, K, H_kv, D]``; the last query stands at the last key.
        value: ``[B, K, H_kv, D]``.
        block_size: tokens of a block, at most 128.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    block_size: int = 128
    _made: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def query_offset(self) -> int:
        """Key position of the first query."""
        return self.key.shape[1] - self.query.shape[1]

    @property
    def first_block(self) -> int:
        """The key block in which the first query stands."""
        return self.query_offset // self.block_size

    @property
    def key_offsets(self) -> Tensor:
        """int32 ``[K_blocks + 1]``."""
        if "key_offsets" not in self._made:
            self._made["key_offsets"] = _even_offsets(self.key.shape[1], self.block_size, self.key.device)
        return self._made["key_offsets"]

    @property
    def query_offsets(self) -> Tensor:
        """int32 ``[Q_blocks + 1]``: the key blocks' boundaries from the first query on."""
        if "query_offsets" not in self._made:
            own = self.key_offsets
            if self.query_offset:
                own = (own[self.first_block :] - self.query_offset).clamp_(min=0)
            self._made["query_offsets"] = own
        return self._made["query_offsets"]

    @property
    def mean_query(self) -> Tensor:
        """float32 ``[B, Q_blocks, H, D]``."""
        self._pool()
        return self._made["mean_query"]

    @property
    def mean_key(self) -> Tensor:
        """float32 ``[B, K_blocks, H_kv, D]``."""
        self._pool()
        return self._made["mean_key"]

    @property
    def visible(self) -> Tensor:
        """bool ``[1, 1, Q_blocks, K_blocks]``: block pairs in which some query sees some key."""
        return self._own_and_before()[1]

    @property
    def diagonal(self) -> Tensor:
        """bool ``[1, 1, Q_blocks, K_blocks]``: each query block's own key block."""
        return self._own_and_before()[0]

    def block_mask(self, block_map: Tensor, max_blocks_per_row: int | None = None) -> BlockMask:
        """A mask over these blocks, of a map bool ``[B | 1, H | H_kv | 1, Q_blocks, K_blocks]``."""
        return BlockMask.from_block_map(
            block_map, self.query_offsets, self.key_offsets, self.block_size, max_blocks_per_row
        )

    def _own_and_before(self) -> tuple[Tensor, Tensor]:
        return _own_and_before(self.first_block, self.key_offsets.shape[0] - 1, self.key.device)

    def _pool(self) -> None:
        if "mean_query" in self._made:
            return
        requests = [PoolRequest(self.query, self.query_offsets), PoolRequest(self.key, self.key_offsets)]
        query, key = pool_together(requests, self.block_size)
        self._made.update(mean_query=query.mean, mean_key=key.mean)


@functools.lru_cache(maxsize=4)  # of a million tokens they are 61 MB each
@torch.inference_mode(False)
def _own_and_before(first: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which key block is each row's own, and which it sees, of the rows from a block to the last."""
    column = torch.arange(columns, device=device)
    own = column[first:, None]
    return (column == own)[None, None], (column <= own)[None, None]


def mean_scores(inputs: CausalInputs, scale: float | None = None) -> Tensor:
    """Scores of mean queries with mean keys, float32 ``[B, H, Q_blocks, K_blocks]``."""
    query, key = inputs.mean_query, inputs.mean_key
    batch, rows, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    # the queries of a group are rows of one product, so that no key is copied
    grouped = query.transpose(1, 2).reshape(batch * key.shape[2], -1, head_dim)
    scores = torch.baddbmm(
        query.new_empty(1, 1, 1), grouped, key.permute(0, 2, 3, 1).flatten(0, 1), beta=0, alpha=scale
    )
    return scores.view(batch, heads, rows, -1)


class CausalPolicy(Protocol):
    """Anything that chooses blocks for a causal attention call: a mask policy, looking at `CausalInputs`."""

    def __call__(self, inputs: CausalInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """The block mask of one call, made on its device without a host sync."""
        ...
