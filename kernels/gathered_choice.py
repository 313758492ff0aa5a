"""Which chunks of keys each query attends to, chosen for every token and head alone (MoBA's gate)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from draftattn.kernels.dispatch import triton_serves


class ChosenChunks(NamedTuple):
    """Where the pairs of a query and a chunk stand, when they are sorted by chunk.

    A *pair* is a query of one head with one of the chunks it chose. Pairs are ordered by batch item, key head and
    chunk; those of a chunk by query, and by head within a query.

    Args:
        place: int32 ``[B, H_kv, P, N, G]``, position of every pair in that order; which of a query's pairs is its first
            is not said.
        cu_seqlens: int32 ``[B * H_kv * C + 1]``, where the pairs of every chunk begin and the last ones end.
    """

    place: Tensor
    cu_seqlens: Tensor


def choose_chunks(
    query: Tensor, key: Tensor, *, first_position: int, chunk_size: int, num_chosen: int, force_first: bool = False
) -> ChosenChunks:
    r"""The past chunks whose mean key fits a query best, by :math:`q \cdot \bar k_c` in float32.

    Of equal products the lowest chunk is taken; NaN counts as infinity. Never waits for the device. On a GPU a kernel
    keeps the scores of a tile of queries in registers; what it stores for pairs of a query and any chunk is a bit each,
    and two counts for every 32 (wide heads in float32: 16). It multiplies on the tensor cores, with means split into
    parts of the keys' dtype: what remains of the split is 2⁻²⁴ of a mean in bf16 and 2⁻²² in fp16, so that products
    closer than float32 tells apart may be ordered either way.

    Args:
        query: ``[B, N, H, D]``, consecutive tokens.
        key: ``[B, K, H_kv, D]``; ``H = H_kv * G``.
        first_position: where the first query stands among the keys.
        chunk_size: tokens of a chunk; chunks begin at key 0. The last one, full or not, is nobody's past: there are
            ``C = (K - 1) // chunk_size`` to choose from.
        num_chosen: chunks a query takes, P. All queries must have as many in front of their own chunk.
        force_first: the first chunk is always among them.

    Raises:
        ValueError: if the first query has fewer than ``num_chosen`` chunks before its own, the last stands past the
            keys, or there are more than 2³¹ - 1 pairs.

    >>> key = torch.tensor([[3.0], [1.0], [0.0], [4.5], [9.0], [9.0]]).view(1, 6, 1, 1)
    >>> query = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    >>> place, cu_seqlens = choose_chunks(query, key, first_position=4, chunk_size=2, num_chosen=1)
    >>> place.flatten().tolist(), cu_seqlens.tolist()
    ([1, 0], [0, 1, 2])
    """
    batch, length, heads, _ = query.shape
    last = first_position + length - 1
    if not 1 <= num_chosen <= first_position // chunk_size:
        raise ValueError(
            f"num_chosen is {num_chosen}; a query at {first_position} has {first_position // chunk_size} chunks of "
            f"{chunk_size} before its own, of which it chooses at least 1"
        )
    if last >= key.shape[1]:
        raise ValueError(f"the last query would stand at {last}; there are {key.shape[1]} keys")
    if batch * length * heads * num_chosen >= 2**31:
        raise ValueError(f"{batch * length * heads * num_chosen} pairs of a query and a chunk; allowed are 2**31 - 1")
    if not triton_serves(query) or query.dtype == torch.float64:
        position = torch.arange(first_position, last + 1, device=query.device)
        chunks = choose_chunks_reference(query, key, position, chunk_size, num_chosen, force_first)
        return sort_pairs_reference(chunks, (key.shape[1] - 1) // chunk_size)
    from draftattn.kernels import triton_gathered_choice

    return ChosenChunks(
        *triton_gathered_choice.choose_chunks(query, key, first_position, chunk_size, num_chosen, force_first)
    )


def choose_chunks_reference(
    query: Tensor, key: Tensor, position: Tensor, chunk_size: int, num_chosen: int, force_first: bool
) -> Tensor:
    """The choice of ``choose_chunks`` in plain torch, for queries anywhere: int32 ``[B, H_kv, P, N, G]``, best first.

    ``position`` is ``[N]``, where the queries stand among the keys. A query with too few chunks before its own fills up
    with others, the lowest first.
    """
    batch, _, kv_heads, _ = key.shape
    past = (key.shape[1] - 1) // chunk_size  # the last chunk is nobody's past
    dtype = torch.promote_types(key.dtype, torch.float32)
    means = key[:, : past * chunk_size].unflatten(1, (past, chunk_size)).mean(2, dtype=dtype)
    hidden = torch.arange(past, device=key.device) >= (position // chunk_size)[:, None, None]
    chosen = torch.empty(
        batch, kv_heads, num_chosen, query.shape[1], query.shape[2] // kv_heads, dtype=torch.int32, device=key.device
    )
    # a key head at a time, for the scores are large
    for item in range(batch):
        for kv_head, of_group in enumerate(query[item].to(dtype).unflatten(1, (kv_heads, -1)).unbind(1)):
            gate = torch.einsum("ngd,cd->ngc", of_group, means[item, :, kv_head])
            gate = gate.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(dtype).min)
            if force_first:
                gate[..., 0] = torch.inf
            gate = gate.masked_fill(hidden, -torch.inf)
            order = gate.sort(dim=-1, descending=True, stable=True).indices
            chosen[item, kv_head] = order[..., :num_chosen].permute(2, 0, 1)
    return chosen


def sort_pairs_reference(chunks: Tensor, num_chunks: int) -> ChosenChunks:
    """The order of ``choose_chunks`` in plain torch, of the chunks int32 ``[B, H_kv, P, N, G]`` that queries chose."""
    batch, kv_heads, slots, length, group = chunks.shape
    unit = torch.arange(batch * kv_heads, device=chunks.device).view(batch, kv_heads, 1, 1, 1)
    segment = (unit * num_chunks + chunks).sort(2).values.permute(0, 1, 3, 4, 2).flatten()
    order = segment.argsort(stable=True)
    place = torch.empty(order.shape, dtype=torch.int32, device=order.device)
    place[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    place = place.view(batch, kv_heads, length, group, slots).permute(0, 1, 4, 2, 3).contiguous()
    counts = torch.bincount(segment, minlength=batch * kv_heads * num_chunks)
    return ChosenChunks(place, torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)))
