"""Block masks of batches whose sequences differ in length: packed one after the other, or padded."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from draftattn.kernels.block_mask import BlockMask, SlidingWindow
from draftattn.kernels.windows import visible_blocks


def varlen_offsets(cu_seqlens: Tensor, total_tokens: int, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """Blocks of packed sequences: each sequence is cut into blocks of its own, the last of them ragged.

    How many there are is known on the device only, so the result is as long as it can become at most, and the surplus
    blocks hold no token. Never waits for the device.

    Args:
        cu_seqlens: int32 ``[N + 1]``, where each of N sequences begins and the last one ends, beginning at 0.
        total_tokens: packed tokens, at least ``cu_seqlens[-1]``.
        block_size: the most tokens a block holds.

    Returns:
        int32 offsets ``[M + 1]`` of ``M = total_tokens // block_size + N`` blocks, and the sequence of each block,
        int32 ``[M]``; N for surplus blocks.

    >>> offsets, sequence = varlen_offsets(torch.tensor([0, 5, 5, 8], dtype=torch.int32), 8, block_size=4)
    >>> offsets.tolist(), sequence.tolist()
    ([0, 4, 5, 8, 8, 8], [0, 0, 2, 3, 3])
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be int32 [N + 1]; got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    num_sequences = len(cu_seqlens) - 1
    lengths = cu_seqlens.diff()
    # blocks up to the end of each sequence
    ends = ((lengths + (block_size - 1)) // block_size).cumsum(0, dtype=torch.int32)
    block = torch.arange(total_tokens // block_size + num_sequences, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, block, right=True, out_int32=True)
    # surplus blocks begin, and end, at the last token
    last = torch.cat([ends.new_zeros(1), ends]).index_select(0, sequence)
    start = cu_seqlens.index_select(0, sequence) + (block - last) * block_size
    start = torch.where(sequence < num_sequences, start, cu_seqlens[-1])
    return torch.cat([start, cu_seqlens[-1:]]), sequence


def varlen_mask(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    total_q: int,
    total_k: int,
    *,
    causal: bool,
    block_size: int = 128,
    query_block_size: int | None = None,
    window: int | None = None,
    sink: int = 0,
    block_map: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> BlockMask:
    """The mask with which attention over packed sequences equals attention over each of them.

    Queries of a sequence see keys of that sequence only; with ``causal`` or a window the last query of each stands at
    its last key. Blocks that no query sees are left out. Never waits for the device.

    Args:
        cu_seqlens_q: int32 ``[N + 1]``, where the queries of each sequence begin and the last one ends.
        cu_seqlens_k: int32 ``[N + 1]``, the same for keys.
        total_q: packed queries, ``S_q``.
        total_k: packed keys, ``S_k``.
        causal: whether the attention call will be causal; pass it the same.
        block_size: tokens of a block, at most 128.
        query_block_size: tokens of a query block, if fewer: 1 to 16 for decoding.
        window: a query at key position ``p`` sees only the keys ``j > p - window`` of its sequence, and its sinks.
        sink: the leading keys of every sequence that all its queries see. Only with ``window``.
        block_map: bool ``[1, H | 1, Q, K]`` over the blocks of ``varlen_offsets``, to intersect with.
        max_seqlen_k: an upper bound on the keys of a sequence, if known: the lists are then only as long as it needs.

    Returns:
        A mask of batch size 1 for query ``[1, total_q, H, D]`` and key and value ``[1, total_k, H_kv, D]``.

    Raises:
        ValueError: if shapes do not fit together.

    >>> from draftattn.kernels.api import block_sparse_attention
    >>> cu_seqlens = torch.tensor([0, 70, 100], dtype=torch.int32)
    >>> query, key, value = torch.randn(3, 1, 100, 2, 32).unbind()
    >>> mask = varlen_mask(cu_seqlens, cu_seqlens, 100, 100, causal=True, block_size=32)
    >>> packed = block_sparse_attention(query, key, value, mask, causal=True)
    >>> second = torch.nn.functional.scaled_dot_product_attention(
    ...     *(x[:, 70:].transpose(1, 2) for x in (query, key, value)), is_causal=True
    ... )
    >>> torch.allclose(packed[:, 70:], second.transpose(1, 2), atol=1e-5)
    True
    """
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must describe as many sequences; got {list(cu_seqlens_q.shape)} and "
            f"{list(cu_seqlens_k.shape)}"
        )
    if window is None and sink:
        raise ValueError(f"sink is {sink} without a window; every key is seen then, so it must be 0")
    query_offsets, query_sequence = varlen_offsets(cu_seqlens_q, total_q, query_block_size or block_size)
    key_offsets, key_sequence = varlen_offsets(cu_seqlens_k, total_k, block_size)
    # surplus blocks take the last sequence, where they hold nothing
    sequence = query_sequence.clamp(max=len(cu_seqlens_q) - 2)
    shifts = (cu_seqlens_k[1:] - cu_seqlens_q[1:]).index_select(0, sequence)
    starts = cu_seqlens_k.index_select(0, sequence)
    visible = visible_blocks(query_offsets, key_offsets, shifts, starts, causal=causal, size=window, sink=sink)
    visible = visible & (query_sequence[:, None] == key_sequence)
    if block_map is not None:
        if block_map.ndim != 4 or block_map.dtype != torch.bool or block_map.shape[2:] != visible.shape[2:]:
            raise ValueError(
                f"block_map must be bool [1, H, {visible.shape[2]}, {visible.shape[3]}]; got {block_map.dtype} "
                f"{list(block_map.shape)}"
            )
        visible = visible & block_map
    mask = BlockMask.from_block_map(
        visible,
        query_offsets,
        key_offsets,
        block_size,
        None if max_seqlen_k is None else -(-max_seqlen_k // block_size),
        query_block_size=query_block_size,
        query_shifts=shifts,
    )
    if window is None:
        return mask
    return replace(mask, window=SlidingWindow(window, sink, None, starts))


def padded_offsets(
    lengths: Tensor, num_tokens: int, block_size: int = 128, *, padding: Literal["left", "right"] = "right"
) -> Tensor:
    """Key offsets per batch item, where items hold different numbers of tokens and the rest is padding.

    Blocks are cut from an item's first token on; those that would hold padding alone are empty, and padding is in no
    block. Never waits for the device.

    Args:
        lengths: int32 ``[B]``, tokens of each item that are no padding.
        num_tokens: tokens of the padded sequence, ``S_k``, or the capacity of a cache.
        block_size: the most tokens a block holds.
        padding: the side where the padding stands.

    Returns:
        int32 ``[B, K + 1]`` with ``K = ceil(num_tokens / block_size)``.

    >>> padded_offsets(torch.tensor([5, 2], dtype=torch.int32), 6, block_size=4).tolist()
    [[0, 4, 5], [0, 2, 2]]
    >>> padded_offsets(torch.tensor([5, 2], dtype=torch.int32), 6, block_size=4, padding="left").tolist()
    [[1, 5, 6], [4, 6, 6]]
    """
    if lengths.ndim != 1 or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be int32 [B]; got {lengths.dtype} {list(lengths.shape)}")
    if padding not in ("left", "right"):
        raise ValueError(f"padding is {padding!r}; choose left or right")
    count = -(-num_tokens // block_size)
    steps = torch.arange(count + 1, dtype=torch.int32, device=lengths.device) * block_size
    offsets = torch.minimum(steps, lengths[:, None])
    return offsets + (num_tokens - lengths)[:, None] if padding == "left" else offsets
