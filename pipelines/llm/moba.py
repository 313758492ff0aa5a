"""MoBA: mixture of block attention, exact per token, forward and backward."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.gathered_choice import choose_chunks, choose_chunks_reference
from draftattn.kernels.gathered_merge import merge_gathered
from draftattn.kernels.gathered_queries import gather_queries, gathered_mask
from draftattn.kernels.runs import mask_of_runs
from draftattn.pipelines.llm.dense import dense_attention
from draftattn.pipelines.llm.density import causal_pairs
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem, SystemConfig

# of gathered queries and of what orders them that exist at once; the outputs take as much again
_GATHERED_BYTES = 3 * 2**29


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
    batch, _, kv_heads, head_dim = key.shape
    if top_k == 1 or first == num_queries or batch == 0:
        return own
    group = query.shape[2] // kv_heads
    # gathered queries are top_k - 1 times as large as the queries, so that all of them may be too many; to order them
    # takes 12 bytes for every 32 rows and every chunk
    fitting = _GATHERED_BYTES // (group * ((top_k - 1) * head_dim * query.element_size() + num_chunks * 12 // 32))
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if wants_gradient:
        # the backward pass transposes the mask, whose rows and columns both grow with every key head
        fitting = num_queries - first
    merged = own.clone() if wants_gradient else own
    for items, tokens, heads in _portions(batch, num_queries - first, kv_heads, fitting):
        tokens = slice(first + tokens.start, first + tokens.stop)
        part = items, tokens, slice(heads.start * group, heads.stop * group)
        chosen = _chosen_chunks(
            query[part], key[items, :, heads], value[items, :, heads], offset + tokens.start,
            chunk_size, top_k, force_first, scale,
        )  # fmt: skip
        lse = own_lse[items, part[2], tokens]
        if wants_gradient:
            merged[part] = merge_gathered(own[part], lse, *chosen)
        else:
            merge_gathered(own[part], lse, *chosen, out=own[part])
    return merged


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
    choice = choose_chunks_reference(query[None], key[None, :, None], position, chunk_size, top_k - 1, force_first)
    return choice[0, 0].permute(1, 2, 0).long()


def _own_chunks(
    query: Tensor, key: Tensor, value: Tensor, chunk_size: int, top_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within the own chunk; for queries of the first ``top_k`` chunks to all before, too."""
    mask = _own_mask(query.shape[1], key.shape[1], chunk_size, top_k, query.device)
    return block_sparse_attention(query, key, value, mask, scale=scale, causal=True, return_lse=True)


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
    """Attention of ``[B, N, H, D]`` queries to each chunk they chose, in the order of heads and chunks.

    Outputs ``[T, D]``, LSEs ``[T]``, and where those of each query and head are, ``[B, H_kv, top_k - 1, N, G]``.
    """
    batch, num_keys, kv_heads, head_dim = key.shape
    past = (num_keys - 1) // chunk_size
    with torch.no_grad():
        place, cu_seqlens = choose_chunks(
            query,
            key,
            first_position=first_position,
            chunk_size=chunk_size,
            num_chosen=top_k - 1,
            force_first=force_first,
        )
        key_offsets = _key_offsets(batch * kv_heads, num_keys, chunk_size, key.device)
        mask = gathered_mask(cu_seqlens, place.numel(), past, -(-chunk_size // 128), key_offsets)
    gathered = gather_queries(query, place)
    # the keys of all items and heads as one sequence, a copy only where there are several
    key, value = (x.transpose(1, 2).reshape(1, -1, 1, head_dim) for x in (key, value))
    output, lse = block_sparse_attention(gathered[None, :, None], key, value, mask, scale=scale, return_lse=True)
    return output[0, :, 0], lse[0, 0], place


def _portions(batch: int, tokens: int, kv_heads: int, fitting: int) -> Iterator[tuple[slice, ...]]:
    """Parts of items, tokens and key heads of which each has at most ``fitting`` tokens, counted per key head.

    >>> [[(x.start, x.stop) for x in part] for part in _portions(2, 10, 3, 20)]
    [[(0, 1), (0, 10), (0, 2)], [(0, 1), (0, 10), (2, 3)], [(1, 2), (0, 10), (0, 2)], [(1, 2), (0, 10), (2, 3)]]
    """
    units = max(fitting // tokens, 1)
    sizes = (batch, units // kv_heads), (tokens, fitting), (kv_heads, units)
    return itertools.product(*(_slices(total, max(most, 1)) for total, most in sizes))


def _slices(total: int, most: int) -> list[slice]:
    size = -(-total // -(-total // most))
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # cached inference tensors would break later autograd
def _own_mask(num_queries: int, num_keys: int, chunk_size: int, top_k: int, device: torch.device) -> BlockMask:
    """A query's own chunk; for queries of the first ``top_k`` chunks all before, too."""
    key_offsets, _ = _chunk_blocks(0, num_keys, chunk_size, device)
    query_offsets, chunk = _chunk_blocks(num_keys - num_queries, num_keys, chunk_size, device)
    per_chunk = -(-chunk_size // 128)
    first = (chunk * per_chunk).masked_fill_(chunk < top_k, 0)
    end = ((chunk + 1) * per_chunk).clamp_(max=len(key_offsets) - 1)
    return mask_of_runs(first, end - first, per_chunk * top_k, query_offsets, key_offsets)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _key_offsets(units: int, num_keys: int, chunk_size: int, device: torch.device) -> Tensor:
    """Boundaries of the key blocks of several heads, one after the other."""
    starts = _chunk_blocks(0, num_keys, chunk_size, device)[0][:-1]
    offsets = (torch.arange(units, dtype=torch.int32, device=device)[:, None] * num_keys + starts).flatten()
    return torch.nn.functional.pad(offsets, (0, 1), value=units * num_keys)


def _chunk_blocks(start: int, end: int, chunk_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks of at most 128 tokens that no boundary of chunks divides: offsets from ``start`` on, and their chunks."""
    chunks = [range(max(i, start), min(i + chunk_size, end)) for i in range(0, end, chunk_size)]
    pieces = [(first - start, i) for i, chunk in enumerate(chunks) for first in chunk[::128]]
    offsets = torch.tensor([*(first for first, _ in pieces), end - start], dtype=torch.int32)
    chunk_of = torch.tensor([i for _, i in pieces], dtype=torch.int32)
    return offsets.to(device, non_blocking=True), chunk_of.to(device, non_blocking=True)
