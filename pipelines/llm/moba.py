"""MoBA: mixture of block attention, exact per token, forward and backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.gathered_merge import merge_gathered
from draftattn.kernels.varlen import varlen_offsets
from draftattn.pipelines.llm.dense import dense_attention
from draftattn.pipelines.llm.density import causal_pairs
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem, SystemConfig


@dataclass(frozen=True)
class MobaConfig(SystemConfig):
    """Every query attends to the past chunks whose mean key fits it best, and to its own chunk causally.

    The choice is made for every token and query head alone, by :math:`q_t \\cdot \\bar k_c` in float32. A query's own
    chunk counts among its ``top_k``; sequences of at most ``top_k`` chunks are therefore full attention, and computed
    as such. Decoding stays dense. Source: MoBA, arXiv 2502.13189. Models that were not trained with it lose the
    attention sink; ``force_first`` keeps it.

    Args:
        chunk_size: tokens of a chunk.
        top_k: chunks that a query attends to.
        force_first: every query attends to the first chunk, which counts among its ``top_k``.
    """

    chunk_size: int = 4096
    top_k: int = 12
    force_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_size < 1:
            raise InputError(f"chunk_size is {self.chunk_size}; it must be at least 1")
        if self.top_k < 1 + self.force_first:
            raise InputError(f"top_k is {self.top_k}; it must be at least {1 + self.force_first}")


class Moba(AttentionSystem):
    """See `MobaConfig`."""

    name, config_class = "moba", MobaConfig

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionSystem.attend`."""
        if call.recorder is not None:
            computed = moba_pairs(call.num_queries, call.num_keys, self.config.chunk_size, self.config.top_k)
            batch = call.query.shape[0]
            call.recorder.add(call.layer, float(computed * batch), call.num_queries, call.num_keys, batch)
        return moba_attention(
            call.query,
            call.key,
            call.value,
            chunk_size=self.config.chunk_size,
            top_k=self.config.top_k,
            force_first=self.config.force_first,
            scale=call.scale,
        )


def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    force_first: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of every query to its own chunk, causally, and to its best ``top_k - 1`` past chunks. Differentiable.

    The own chunk is one call of the kernel; for the others queries are gathered by the chunk they chose, attended to
    it, and the parts merged by their LSE. Nothing is computed that is not in the result, and nothing waits for the
    device: how many queries choose chunks is known, only which is not.

    Args:
        query: ``[B, N, H, D]``; the last query stands at the last key.
        key: ``[B, K, H_kv, D]``.
        value: ``[B, K, H_kv, D]``.
        chunk_size: tokens of a chunk; chunks begin at key 0.
        top_k: chunks of a query, its own among them.
        force_first: the first chunk is always among them.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        ``[B, N, H, D]``.

    >>> query, key, value = torch.randn(3, 1, 40, 2, 16).unbind()
    >>> moba_attention(query, key, value, chunk_size=8, top_k=2).shape
    torch.Size([1, 40, 2, 16])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    num_queries, num_keys = query.shape[1], key.shape[1]
    num_chunks = -(-num_keys // chunk_size)
    if num_chunks <= top_k:
        return dense_attention(query, key, value, scale)
    offset = num_keys - num_queries
    # queries before this one see no more than top_k chunks, and all of them
    first = min(max(top_k * chunk_size - offset, 0), num_queries)
    own, own_lse = _own_chunks(query, key, value, chunk_size, top_k, scale)
    if top_k == 1 or first == num_queries:
        return own
    # a key head at a time: gathered queries are top_k times as large as the queries of its group
    group = query.shape[2] // key.shape[2]
    items = []
    for item in range(query.shape[0]):
        heads = []
        for kv_head in range(key.shape[2]):
            of_group = slice(kv_head * group, (kv_head + 1) * group)
            parts = _chosen_chunks(
                query[item, first:, of_group], key[item, :, kv_head], value[item, :, kv_head], offset + first,
                chunk_size, top_k, force_first, scale,
            )  # fmt: skip
            heads.append(merge_gathered(own[item, first:, of_group], own_lse[item, of_group, first:], *parts))
        items.append(torch.cat(heads, dim=1))
    rest = torch.stack(items)
    return rest if first == 0 else torch.cat([own[:, :first], rest], dim=1)


def moba_pairs(num_queries: int, num_keys: int, chunk_size: int, top_k: int) -> int:
    """Pairs of a query and a key that MoBA computes, per head.

    >>> moba_pairs(40, 40, 8, 2), moba_pairs(40, 40, 8, 5)
    (436, 820)
    """
    total, offset = causal_pairs(num_queries, num_keys), num_keys - num_queries
    for chunk in range(top_k, -(-num_keys // chunk_size)):
        queries = min((chunk + 1) * chunk_size, num_keys) - max(chunk * chunk_size, offset)
        total -= max(queries, 0) * (chunk - top_k + 1) * chunk_size
    return total


def moba_choice(
    query: Tensor, key: Tensor, position: Tensor, *, chunk_size: int, top_k: int, force_first: bool = False
) -> Tensor:
    """The past chunks that queries choose beside their own.

    Args:
        query: ``[N, H, D]``, queries that see more than ``top_k`` chunks.
        key: ``[K, D]``, of the key head they share.
        position: ``[N]``, where they stand among the keys.
        chunk_size: tokens of a chunk.
        top_k: chunks of a query, its own among them.
        force_first: the first chunk is always among them.

    Returns:
        int64 ``[N, H, top_k - 1]``, best first.
    """
    past = (key.shape[0] - 1) // chunk_size  # the last chunk is nobody's past
    dtype = torch.promote_types(key.dtype, torch.float32)
    means = key[: past * chunk_size].unflatten(0, (past, chunk_size)).mean(1, dtype=dtype)
    gate = torch.einsum("nhd,cd->nhc", query.to(means.dtype), means)
    chunk = torch.arange(means.shape[0], device=key.device)
    if force_first:
        gate[..., 0] = torch.inf
    gate = gate.masked_fill(chunk >= (position // chunk_size)[:, None, None], -torch.inf)
    return gate.topk(top_k - 1, dim=-1).indices


def _own_chunks(
    query: Tensor, key: Tensor, value: Tensor, chunk_size: int, top_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within the own chunk; for queries of the first ``top_k`` chunks to all before, too."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    key_offsets, key_chunk = _chunk_blocks(0, num_keys, chunk_size, key.device)
    query_offsets, query_chunk = _chunk_blocks(num_keys - num_queries, num_keys, chunk_size, key.device)
    query_chunk = query_chunk[:, None]
    block_map = (key_chunk == query_chunk) | ((key_chunk < query_chunk) & (query_chunk < top_k))
    mask = BlockMask.from_block_map(block_map[None, None], query_offsets, key_offsets)
    return block_sparse_attention(query, key, value, mask, scale=scale, causal=True, return_lse=True)


@functools.lru_cache(maxsize=16)
def _chunk_blocks(start: int, end: int, chunk_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks of at most 128 tokens that no boundary of chunks divides: offsets from ``start`` on, and their chunks."""
    chunks = [range(max(i, start), min(i + chunk_size, end)) for i in range(0, end, chunk_size)]
    pieces = [(first - start, i) for i, chunk in enumerate(chunks) for first in chunk[::128]]
    offsets = torch.tensor([*(first for first, _ in pieces), end - start], dtype=torch.int32)
    chunk_of = torch.tensor([i for _, i in pieces], dtype=torch.int32)
    return offsets.to(device, non_blocking=True), chunk_of.to(device, non_blocking=True)


class _Gathered(NamedTuple):
    """Pairs of a query and a head, once per chunk they chose, in the order of the chunks."""

    row: Tensor  # index into the flattened pairs
    place: Tensor  # of each pair and slot, where it went, [pairs, slots]
    cu_seqlens: Tensor  # where the pairs of each chunk begin


def _gather(choice: Tensor, num_chunks: int) -> _Gathered:
    slots = choice.shape[-1]
    flat = choice.reshape(-1)
    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    counts = torch.zeros(num_chunks, dtype=torch.int32, device=flat.device)
    counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return _Gathered(order // slots, place.view(-1, slots), cu_seqlens)


def _chosen_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_position: int,
    chunk_size: int,
    top_k: int,
    force_first: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of ``[N, group, D]`` queries to each chunk they chose, in the order of the chunks.

    Outputs ``[T, D]``, LSEs ``[T]``, and where those of each query and head are, ``[N, group, top_k - 1]``.
    """
    num_queries, group, head_dim = query.shape
    num_chunks = -(-key.shape[0] // chunk_size)
    position = torch.arange(first_position, first_position + num_queries, device=query.device)
    with torch.no_grad():
        choice = moba_choice(query, key, position, chunk_size=chunk_size, top_k=top_k, force_first=force_first)
        gathered = _gather(choice, num_chunks)
        total = choice.numel()
        query_offsets, chunk = varlen_offsets(gathered.cu_seqlens, total)
        key_offsets, _ = _chunk_blocks(0, key.shape[0], chunk_size, key.device)
        # a chunk's blocks follow each other; the last chunk, where blocks may be fewer, is nobody's past
        per_chunk = -(-chunk_size // 128)
        counts = torch.full_like(chunk, per_chunk)
        ids = chunk.clamp(max=num_chunks - 2)[:, None] * per_chunk + torch.arange(
            per_chunk, dtype=torch.int32, device=key.device
        )
        mask = BlockMask(counts[None, None], ids[None, None], query_offsets, key_offsets)
    packed = query.reshape(-1, head_dim).index_select(0, gathered.row)
    output, lse = block_sparse_attention(
        packed[None, :, None], key[None, :, None], value[None, :, None], mask, scale=scale, return_lse=True
    )
    return output[0, :, 0], lse[0, 0], gathered.place.view(num_queries, group, -1)
