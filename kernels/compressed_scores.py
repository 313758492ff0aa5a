"""Scores of key blocks from attention over compressed keys, one row per query and key head.

NSA (arXiv 2502.11089) and InfLLM v2 (arXiv 2509.24663) attend to short overlapping blocks of keys first, each
compressed to one, and choose the blocks that they then attend to token by token from those probabilities.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from draftattn.kernels.backends import TRITON_DTYPES, TRITON_HEAD_DIMS
from draftattn.kernels.dispatch import triton_serves

_CHUNK_SCORES = 2**24


class AlwaysChosen(NamedTuple):
    """Blocks whose score is infinity whatever the probabilities say; blocks after a query's own get ``-inf``.

    Args:
        own: int32 ``[T]``, the block that each query stands in.
        initial: leading blocks of the sequence.
        local: blocks up to the query's own, which is one of them.
    """

    own: Tensor
    initial: int = 1
    local: int = 1


def compressed_block_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    visible: Tensor,
    num_blocks: int,
    *,
    block_width: int,
    key_width: int,
    scale: float | None = None,
    reduce: Literal["overlap", "max"] = "overlap",
    always: AlwaysChosen | None = None,
) -> Tensor:
    r"""Scores of key blocks, for every query and key head, from the probabilities of compressed keys.

    Compressed key ``i`` stands for the strides ``i`` to ``i + key_width - 1`` of the sequence, block ``j`` for the
    strides ``block_width * j`` to ``block_width * (j + 1) - 1``. With
    :math:`p_{ti} = \sum_h \exp(\text{scale}\; q_{th} k_i - \text{lse}_{th})` over the query heads of a key head,
    ``"overlap"`` gives a block the sum of the :math:`p_{ti}` that touch it, each times the strides they share (NSA,
    equation 9), ``"max"`` the largest of them (InfLLM v2). Not differentiable; never waits for the device.

    Args:
        query: ``[B, T, H, D]``.
        key: compressed keys ``[B, C, H_kv, D]``; ``H`` must be a multiple of ``H_kv``.
        lse: log-sum-exp of every query over the compressed keys that it sees, ``[B, H, T]``.
        visible: int32 ``[T]``: the leading compressed keys that each query sees.
        num_blocks: blocks to score, ``K``.
        block_width: strides of a block.
        key_width: strides of a compressed key.
        scale: factor of the scores, ``D ** -0.5`` if None.
        reduce: ``"overlap"`` or ``"max"``.
        always: blocks to choose in any case; None for none.

    Returns:
        float32 ``[B, H_kv, T, K]`` (float64 for float64 inputs), 0 where nothing that a query sees touches a block.

    Raises:
        ValueError: if shapes do not fit together.

    >>> query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 5, 1, 4)
    >>> lse, visible = torch.full((1, 1, 1), 5.0).log(), torch.tensor([5], dtype=torch.int32)
    >>> scores = compressed_block_scores(query, key, lse, visible, 2, block_width=4, key_width=2)
    >>> scores.flatten().mul(5).round().tolist()
    [7.0, 3.0]
    """
    _validate(query, key, lse, visible, num_blocks, block_width, key_width, always)
    if reduce not in ("overlap", "max"):
        raise ValueError(f"reduce is {reduce!r}; choose overlap or max")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key, lse = query.detach(), key.detach(), lse.detach()
    arguments = query, key, lse, visible, num_blocks, block_width, key_width, scale, reduce == "max", always
    if not _kernel_serves(query, key):
        return compressed_block_scores_reference(*arguments)
    from draftattn.kernels import triton_compressed_scores

    return triton_compressed_scores.compressed_block_scores(*arguments)


def compressed_block_scores_reference(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    visible: Tensor,
    num_blocks: int,
    block_width: int,
    key_width: int,
    scale: float,
    maximum: bool,
    always: AlwaysChosen | None = None,
) -> Tensor:
    """``compressed_block_scores`` in plain torch, some queries at a time."""
    batch, length, heads, _ = query.shape
    count, kv_heads = key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros(batch, kv_heads, length, num_blocks, dtype=dtype, device=query.device)
    if count == 0 or out.numel() == 0:
        return _with_always(out, always)
    touching = block_width + key_width - 1
    overlap = torch.arange(1, touching + 1, device=query.device)
    overlap = torch.minimum(overlap, overlap.flip(0)).clamp(max=min(key_width, block_width)).to(dtype)
    # keys before the first stride, and behind the last, that blocks at the edges would touch
    padding = (key_width - 1, max(0, num_blocks * block_width - count))
    column = torch.arange(count, device=query.device)
    # a query that sees nothing has probabilities of 0
    lse = lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf)
    rows = max(1, _CHUNK_SCORES // max(1, batch * heads * count))
    for first in range(0, length, rows):
        part = slice(first, first + rows)
        queries = query[:, part].unflatten(2, (kv_heads, -1))
        scores = torch.einsum("bthgd,bchd->bhgtc", queries, key).to(dtype) * scale
        probabilities = (scores - lse[:, :, part].unflatten(1, (kv_heads, -1))[..., None]).exp()
        seen = column < visible[part, None]
        summed = probabilities.masked_fill(~seen, 0.0).sum(2)
        windows = torch.nn.functional.pad(summed, padding).unfold(-1, touching, block_width)[..., :num_blocks, :]
        out[:, :, part] = windows.amax(-1) if maximum else windows @ overlap
    return _with_always(out, always)


def _with_always(scores: Tensor, always: AlwaysChosen | None) -> Tensor:
    if always is None:
        return scores
    block, own = torch.arange(scores.shape[-1], device=scores.device), always.own[:, None]
    chosen = (block < always.initial) | (block > own - always.local)
    return scores.masked_fill(chosen, torch.inf).masked_fill(block > own, -torch.inf)


def _kernel_serves(query: Tensor, key: Tensor) -> bool:
    serves = triton_serves(query) and query.dtype in TRITON_DTYPES and query.shape[3] in TRITON_HEAD_DIMS
    return serves and query.shape[2] // key.shape[2] <= 128 and query.stride(3) == key.stride(3) == 1


def _validate(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    visible: Tensor,
    num_blocks: int,
    block_width: int,
    key_width: int,
    always: AlwaysChosen | None,
) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim]; got shape {list(tensor.shape)}")
    batch, length, heads, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or heads % key.shape[2]:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} do not fit together")
    if lse.shape != (batch, heads, length):
        raise ValueError(f"lse must be {[batch, heads, length]}; got {list(lse.shape)}")
    per_query = [("visible", visible)] if always is None else [("visible", visible), ("always.own", always.own)]
    for name, tensor in per_query:
        if tensor.shape != (length,) or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [{length}]; got {tensor.dtype} {list(tensor.shape)}")
    if min(num_blocks, block_width, key_width) < 1:
        raise ValueError(
            f"num_blocks is {num_blocks}, block_width {block_width}, key_width {key_width}; all must be at least 1"
        )
