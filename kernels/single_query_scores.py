"""Scores of key blocks from the attention of one query to all compressed keys: a decoding step of InfLLM v2."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.backends import TRITON_DTYPES, TRITON_HEAD_DIMS
from draftattn.kernels.compressed_lse import compressed_lse_reference
from draftattn.kernels.compressed_scores import AlwaysChosen, compressed_block_scores_reference
from draftattn.kernels.dispatch import triton_serves


def single_query_block_scores(
    query: Tensor,
    key: Tensor,
    num_blocks: int,
    *,
    block_width: int,
    key_width: int,
    scale: float | None = None,
    initial: int = 1,
    local: int = 1,
) -> Tensor:
    """What `compressed_lse` and ``compressed_block_scores(..., reduce="max")`` give for one query behind all keys.

    The softmax of the query's scores with all compressed keys, summed over the query heads of a key head; a block gets
    the largest entry among the compressed keys that touch it. On a GPU two launches, each spread over all of it, that
    read the compressed keys once. Not differentiable; never waits for the device.

    Args:
        query: ``[B, 1, H, D]``; it stands in the last block.
        key: compressed keys ``[B, C, H_kv, D]``; ``H`` must be a multiple of ``H_kv``.
        num_blocks: blocks to score, ``K``.
        block_width: strides of a block.
        key_width: strides of a compressed key, see `compressed_block_scores`.
        scale: factor of the scores, ``D ** -0.5`` if None.
        initial: leading blocks whose score is infinity.
        local: last blocks whose score is infinity.

    Returns:
        float32 ``[B, H_kv, 1, K]`` (float64 for float64 inputs), 0 where nothing touches a block.

    Raises:
        ValueError: if shapes do not fit together.

    >>> query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 8, 1, 4)
    >>> single_query_block_scores(query, key, 4, block_width=2, key_width=2).flatten().tolist()
    [inf, 0.25, 0.25, inf]
    """
    for name, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim]; got shape {list(tensor.shape)}")
    batch, length, heads, head_dim = query.shape
    if length != 1 or key.shape[0] != batch or key.shape[3] != head_dim or heads % key.shape[2]:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} are not one query and its keys")
    if min(num_blocks, block_width, key_width) < 1:
        raise ValueError(
            f"num_blocks is {num_blocks}, block_width {block_width}, key_width {key_width}; all must be at least 1"
        )
    scale = head_dim**-0.5 if scale is None else float(scale)
    arguments = query.detach(), key.detach(), num_blocks, block_width, key_width, scale, initial, local
    if not _kernel_serves(query, key):
        return single_query_block_scores_reference(*arguments)
    from draftattn.kernels import triton_single_query_scores

    return triton_single_query_scores.single_query_block_scores(*arguments)


def single_query_block_scores_reference(
    query: Tensor,
    key: Tensor,
    num_blocks: int,
    block_width: int,
    key_width: int,
    scale: float,
    initial: int,
    local: int,
) -> Tensor:
    """``single_query_block_scores`` in plain torch: the functions for any number of queries."""
    visible, own = (query.new_full((1,), number, dtype=torch.int32) for number in (key.shape[1], num_blocks - 1))
    lse = compressed_lse_reference(query, key, visible, scale)
    always = AlwaysChosen(own, initial, local)
    return compressed_block_scores_reference(
        query, key, lse, visible, num_blocks, block_width, key_width, scale, True, always
    )


def _kernel_serves(query: Tensor, key: Tensor) -> bool:
    serves = triton_serves(query) and query.dtype in TRITON_DTYPES and query.shape[3] in TRITON_HEAD_DIMS
    return serves and query.dtype == key.dtype and query.shape[2] // key.shape[2] <= 128
