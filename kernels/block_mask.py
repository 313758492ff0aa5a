"""Which key blocks each query block attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from draftattn.kernels.selection import density_of_lists, list_blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


class SlidingWindow(NamedTuple):
    """A rule for single tokens inside chosen blocks: the last keys and the first ones (*sinks*) of a sequence.

    A query at key position ``p`` sees the keys ``j > p - size`` and the first ``sink`` keys of its sequence; together
    with ``causal`` that is a sliding window of ``size`` keys, its own among them. Source of the pair: StreamingLLM,
    arXiv 2309.17453.

    Args:
        size: keys of the window, at least 1.
        sink: leading keys that every query sees.
        whole: bool, the shape of ``kv_indices``: entries that are exempt from the rule and computed whole, such as
            blocks that a policy selected far from the window. None: the rule holds for every entry.
        starts: int32 ``[Q]`` or ``[B, Q]``: the first key of each query block's sequence. None: the first key of the
            first key block, past any left padding.
    """

    size: int
    sink: int = 0
    whole: Tensor | None = None
    starts: Tensor | None = None


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A block-sparse attention pattern over ragged blocks, in FlexAttention's vocabulary.

    Query block ``i`` holds the tokens ``query_offsets[i] : query_offsets[i + 1]`` and attends to the key blocks
    ``kv_indices[b, h, i, : kv_num_blocks[b, h, i]]``. Blocks may hold fewer than ``block_size`` tokens, or none.

    Args:
        kv_num_blocks: int32 ``[B | 1, H | 1, Q]``, how many key blocks a query block attends to.
        kv_indices: int32 ``[B | 1, H | 1, Q, C]``, their ids: distinct, ascending, left-packed. Entries past
            ``kv_num_blocks`` are never used but must be valid ids.
        query_offsets: int32 ``[Q + 1]``, block boundaries in the query sequence.
        key_offsets: int32 ``[K + 1]``, or ``[B, K + 1]`` where batch items hold different numbers of valid keys.
        block_size: the most tokens any block holds, at most 128.
        query_block_size: the same for query blocks, where they are smaller; None: as ``block_size``.
        query_shifts: int32 ``[Q]`` or ``[B, Q]``: the query at index ``i`` of a block stands at key position
            ``i + shift``, for ``causal`` and windows. None: ``S_k - S_q``, so that the last query sees the last key.
        window: a rule for single tokens of the chosen blocks, or None.

    A dimension of 1 is shared by all batch items or heads. Heads are query heads, or key heads where the query heads
    of a group share one pattern.

    >>> offsets = torch.tensor([0, 100, 200, 230], dtype=torch.int32)
    >>> block_map = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    >>> mask = BlockMask.from_block_map(block_map[None, None], offsets, offsets)
    >>> mask.kv_num_blocks.tolist(), mask.kv_indices[0, 0, 0, :2].tolist()
    ([[[2, 2, 3]]], [0, 2])
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    block_size: int = 128
    query_block_size: int | None = None
    query_shifts: Tensor | None = None
    window: SlidingWindow | None = None

    def __post_init__(self) -> None:
        for name, size in (("block_size", self.block_size), ("query_block_size", self.largest_query_block)):
            if not 1 <= size <= 128:
                raise ValueError(f"{name} is {size}; a block holds 1 to 128 tokens")
        if self.kv_indices.ndim != 4 or self.kv_num_blocks.shape != self.kv_indices.shape[:3]:
            raise ValueError(
                "kv_num_blocks must be [B, H, Q] and kv_indices [B, H, Q, C]; got "
                f"{list(self.kv_num_blocks.shape)} and {list(self.kv_indices.shape)}"
            )
        if self.query_offsets.shape != (self.kv_num_blocks.shape[2] + 1,):
            raise ValueError(
                f"query_offsets must hold {self.kv_num_blocks.shape[2] + 1} boundaries for "
                f"{self.kv_num_blocks.shape[2]} query blocks; got shape {list(self.query_offsets.shape)}"
            )
        if self.key_offsets.ndim not in (1, 2):
            raise ValueError(f"key_offsets must be [K + 1] or [B, K + 1]; got shape {list(self.key_offsets.shape)}")
        for name in ("kv_num_blocks", "kv_indices", "query_offsets", "key_offsets"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int32:
                raise ValueError(f"{name} must be int32; got {tensor.dtype}")
            if tensor.device != self.device:
                raise ValueError(f"{name} is on {tensor.device}, kv_indices on {self.device}")
        starts = None if self.window is None else self.window.starts
        for name, per_block in (("query_shifts", self.query_shifts), ("window.starts", starts)):
            if per_block is None:
                continue
            if per_block.ndim not in (1, 2) or per_block.shape[-1] != self.num_query_blocks:
                raise ValueError(
                    f"{name} must be [Q] or [B, Q] with Q = {self.num_query_blocks}; got {list(per_block.shape)}"
                )
            if per_block.dtype != torch.int32 or per_block.device != self.device:
                raise ValueError(f"{name} must be int32 on {self.device}; got {per_block.dtype} on {per_block.device}")
        if self.window is not None:
            self._check_window(self.window)

    def _check_window(self, window: SlidingWindow) -> None:
        if window.size < 1 or window.sink < 0:
            raise ValueError(f"window has size {window.size} and sink {window.sink}; allowed are size >= 1, sink >= 0")
        whole = window.whole
        if whole is not None and (
            whole.shape != self.kv_indices.shape or whole.dtype != torch.bool or whole.device != self.device
        ):
            raise ValueError(
                f"window.whole must be bool {list(self.kv_indices.shape)} on {self.device}; got {whole.dtype} "
                f"{list(whole.shape)} on {whole.device}"
            )

    @property
    def largest_query_block(self) -> int:
        """The most tokens any query block holds."""
        return self.block_size if self.query_block_size is None else self.query_block_size

    @property
    def num_query_blocks(self) -> int:
        """Number of query blocks, Q."""
        return self.kv_num_blocks.shape[2]

    @property
    def num_key_blocks(self) -> int:
        """Number of key blocks, K."""
        return self.key_offsets.shape[-1] - 1

    @property
    def device(self) -> torch.device:
        """Device of the index tensors."""
        return self.kv_indices.device

    @cached_property
    def block_map(self) -> Tensor:
        """The same pattern as a boolean map ``[B | 1, H | 1, Q, K]``."""
        return self._map_of(self._used)

    @property
    def whole_map(self) -> Tensor:
        """The chosen blocks that a window's rule does not thin out, as a boolean map like ``block_map``."""
        if self.window is None:
            return self.block_map
        if self.window.whole is None:
            return torch.zeros_like(self.block_map)
        return self._map_of(self._used & self.window.whole)

    @property
    def _used(self) -> Tensor:
        return torch.arange(self.kv_indices.shape[-1], device=self.device) < self.kv_num_blocks[..., None]

    def _map_of(self, entries: Tensor) -> Tensor:
        # Other entries go to a spare last column, so that they cannot unset a used id.
        ids = torch.where(entries, self.kv_indices, self.num_key_blocks)
        block_map = torch.zeros(*ids.shape[:3], self.num_key_blocks + 1, dtype=torch.bool, device=self.device)
        return block_map.scatter_(-1, ids.long(), True)[..., :-1].contiguous()

    @property
    def density(self) -> Tensor:
        """Share of all query-key scores in chosen blocks, a float64 scalar on the mask's device (no host sync).

        What ``causal`` and a window hide inside chosen blocks counts as computed.
        """
        return density_of_lists(self.kv_num_blocks, self.kv_indices, self.query_offsets, self.key_offsets)

    @classmethod
    def from_block_map(
        cls,
        block_map: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        block_size: int = 128,
        max_blocks_per_row: int | None = None,
        *,
        query_block_size: int | None = None,
        query_shifts: Tensor | None = None,
    ) -> BlockMask:
        """Builds the index lists of a boolean map on its device, without a host sync.

        Args:
            block_map: bool ``[B | 1, H | 1, Q, K]``, true where a block pair is computed.
            query_offsets: int32 ``[Q + 1]``.
            key_offsets: int32 ``[K + 1]`` or ``[B, K + 1]``.
            block_size: the most tokens any block holds.
            max_blocks_per_row: an upper bound on the true entries of a row, where the caller knows one: the lists
                are then only that long. A row with more keeps its first ones.
            query_block_size: the most tokens any query block holds, if fewer than ``block_size``.
            query_shifts: see `BlockMask`.
        """
        if block_map.ndim != 4 or block_map.dtype != torch.bool:
            raise ValueError(f"block_map must be bool [B, H, Q, K]; got {block_map.dtype} {list(block_map.shape)}")
        if block_map.shape[-1] != key_offsets.shape[-1] - 1:
            raise ValueError(
                f"block_map has {block_map.shape[-1]} key blocks and key_offsets describes {key_offsets.shape[-1] - 1}"
            )
        num_key_blocks = block_map.shape[-1]
        capacity = max(1, num_key_blocks if max_blocks_per_row is None else min(max_blocks_per_row, num_key_blocks))
        kv_num_blocks, kv_indices = list_blocks(block_map, capacity)
        mask = cls(
            kv_num_blocks=kv_num_blocks,
            kv_indices=kv_indices,
            query_offsets=query_offsets,
            key_offsets=key_offsets,
            block_size=block_size,
            query_block_size=query_block_size,
            query_shifts=query_shifts,
        )
        # dynamo of torch 2.6 cannot follow the next line
        if capacity >= num_key_blocks and not torch.compiler.is_compiling():
            mask.__dict__["block_map"] = block_map  # spares the cached property its scatter
        return mask

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        window = self.window
        if window is not None:
            whole, starts = (None if x is None else x.to(device) for x in (window.whole, window.starts))
            window = window._replace(whole=whole, starts=starts)
        return replace(
            self,
            kv_num_blocks=self.kv_num_blocks.to(device),
            kv_indices=self.kv_indices.to(device),
            query_offsets=self.query_offsets.to(device),
            key_offsets=self.key_offsets.to(device),
            query_shifts=None if self.query_shifts is None else self.query_shifts.to(device),
            window=window,
        )

    def to_dense(self, batch_index: int = 0) -> Tensor:
        """The token-level boolean mask ``[H | 1, S_q, S_k]`` of one batch item. For tests and pictures: it is S×S.

        It spans the tokens of the blocks: offsets that begin at 0 and end at the sequence's length give all of them.
        """
        offsets = self.key_offsets if self.key_offsets.ndim == 1 else self.key_offsets[batch_index]
        block_map = self.block_map[min(batch_index, self.block_map.shape[0] - 1)]
        rows = block_map.repeat_interleave(self.query_offsets.diff().long(), dim=1)
        return rows.repeat_interleave(offsets.diff().long(), dim=2)

    def to_flex(self) -> FlexBlockMask:
        """The same pattern as a ``torch.nn.attention.flex_attention.BlockMask``.

        Raises:
            ValueError: if blocks other than the last are ragged or batch items have their own key offsets, which
                torch's mask cannot express.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        if self.key_offsets.ndim == 2:
            raise ValueError("torch's BlockMask cannot hold key offsets per batch item")
        if self.window is not None or self.query_shifts is not None:
            raise ValueError("torch's BlockMask of full blocks cannot hold a window or query_shifts")
        if self.largest_query_block != self.block_size:
            raise ValueError(
                f"query blocks hold {self.largest_query_block} and key blocks {self.block_size} tokens; they must agree"
            )
        for name, offsets in (("query", self.query_offsets), ("key", self.key_offsets)):
            if bool((offsets.diff()[:-1] != self.block_size).any()):
                raise ValueError(
                    f"torch's BlockMask needs {name} blocks of {self.block_size} tokens; some blocks are ragged"
                )
        return FlexBlockMask.from_kv_blocks(
            kv_num_blocks=torch.zeros_like(self.kv_num_blocks),
            kv_indices=torch.zeros_like(self.kv_indices),
            full_kv_num_blocks=self.kv_num_blocks,
            full_kv_indices=self.kv_indices,
            BLOCK_SIZE=self.block_size,
            seq_lengths=(int(self.query_offsets[-1]), int(self.key_offsets[-1])),
        )

    @classmethod
    def from_flex(cls, mask: FlexBlockMask) -> BlockMask:
        """Takes the pattern of a torch ``BlockMask`` whose blocks are square, full and at most 128 tokens.

        Raises:
            ValueError: if some blocks are partial (they carry a ``mask_mod`` this kernel does not run).
        """
        block_size = mask.BLOCK_SIZE[0]
        if mask.BLOCK_SIZE[1] != block_size:
            raise ValueError(f"torch BlockMask has blocks of {mask.BLOCK_SIZE}; they must be square")
        if mask.full_kv_num_blocks is None or mask.full_kv_indices is None or bool((mask.kv_num_blocks > 0).any()):
            raise ValueError("torch BlockMask has partial blocks (mask_mod); only full blocks can be taken over")
        device = mask.full_kv_indices.device
        query_offsets, key_offsets = (
            torch.arange(0, length + block_size, block_size, dtype=torch.int32, device=device).clamp_(max=length)
            for length in mask.seq_lengths
        )
        columns = torch.arange(mask.full_kv_indices.shape[-1], device=device)
        used = columns < mask.full_kv_num_blocks[..., None]
        num_key_blocks = key_offsets.shape[0] - 1
        block_map = torch.zeros(*used.shape[:3], num_key_blocks + 1, dtype=torch.bool, device=device)
        block_map.scatter_(-1, torch.where(used, mask.full_kv_indices, num_key_blocks).long(), True)
        return cls.from_block_map(block_map[..., :-1], query_offsets, key_offsets, block_size)
