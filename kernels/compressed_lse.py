"""The log-sum-exp of queries over the compressed keys that they see, which `compressed_block_scores` divides by."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.backends import TRITON_DTYPES, TRITON_HEAD_DIMS
from draftattn.kernels.dispatch import triton_serves

_CHUNK_SCORES = 2**24  # alive at once


def compressed_lse(query: Tensor, key: Tensor, visible: Tensor, *, scale: float | None = None) -> Tensor:
    r"""For every query :math:`\log \sum_{i < \text{visible}} \exp(\text{scale}\; q \cdot k_i)`.

    The first stage of InfLLM v2 (arXiv 2509.24663) without its output: one product, no values. Not differentiable;
    never waits for the device.

    Args:
        query: ``[B, T, H, D]``.
        key: compressed keys ``[B, C, H_kv, D]``; ``H`` must be a multiple of ``H_kv``.
        visible: int32 ``[T]``: the leading compressed keys that each query sees.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        float32 ``[B, H, T]`` (float64 for float64 inputs); ``-inf`` for queries that see nothing.

    Raises:
        ValueError: if shapes do not fit together.

    >>> query, key = torch.zeros(1, 3, 2, 4), torch.zeros(1, 5, 1, 4)
    >>> compressed_lse(query, key, torch.tensor([0, 1, 5], dtype=torch.int32)).exp().round()[0, 0].tolist()
    [0.0, 1.0, 5.0]
    """
    for name, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim]; got shape {list(tensor.shape)}")
    batch, length, heads, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or heads % key.shape[2]:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} do not fit together")
    if visible.shape != (length,) or visible.dtype != torch.int32:
        raise ValueError(f"visible must be int32 [{length}]; got {visible.dtype} {list(visible.shape)}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    query, key = query.detach(), key.detach()
    if not _kernel_serves(query, key):
        return compressed_lse_reference(query, key, visible, scale)
    from draftattn.kernels import triton_compressed_lse

    return triton_compressed_lse.compressed_lse(query, key, visible, scale)


def compressed_lse_reference(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """``compressed_lse`` in plain torch, some queries at a time."""
    batch, length, heads, _ = query.shape
    count, kv_heads = key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_full((batch, heads, length), -torch.inf, dtype=dtype)
    column = torch.arange(count, device=query.device)
    rows = max(1, _CHUNK_SCORES // max(1, batch * heads * count))
    for first in range(0, length if count else 0, rows):
        part = slice(first, first + rows)
        queries = query[:, part].unflatten(2, (kv_heads, -1))
        scores = torch.einsum("bthgd,bchd->bhgtc", queries, key).to(dtype) * scale
        unseen = column >= visible[part, None]
        out[:, :, part] = scores.masked_fill_(unseen, -torch.inf).logsumexp(-1).flatten(1, 2)
    return out


def _kernel_serves(query: Tensor, key: Tensor) -> bool:
    serves = triton_serves(query) and query.dtype in TRITON_DTYPES and query.shape[3] in TRITON_HEAD_DIMS
    return serves and query.shape[2] // key.shape[2] <= 128
