"""Dense causal attention, on the fastest kernel that serves: what sparse systems fall back to where they do not pay."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from draftattn.kernels.api import block_sparse_attention
from draftattn.pipelines.llm.causal_masks import causal_mask


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention in which the last query stands at the last key.

    Args:
        query: ``[B, N, H, D]``.
        key: ``[B, K, H_kv, D]``, ``K >= N``.
        value: ``[B, K, H_kv, D]``.
        scale: factor of the scores.
        window: keys that a query sees, its own among them; None for all.

    Returns:
        ``[B, N, H, D]``.

    >>> import torch
    >>> query, key, value = torch.randn(3, 1, 5, 2, 16).unbind()
    >>> last = dense_attention(query[:, 4:], key, value, 0.25)
    >>> torch.allclose(last, dense_attention(query, key, value, 0.25)[:, 4:], atol=1e-6)
    True
    """
    num_queries, num_keys = query.shape[1], key.shape[1]
    if window is not None and num_keys > window:
        return _with_window(query, key, value, scale, window)
    if num_queries in (1, num_keys):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=num_queries > 1,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output.transpose(1, 2)
    # torch aligns a causal mask at the top left, and a mask of its own would be N×K
    mask = causal_mask(num_queries, num_keys, None, query.device)
    return block_sparse_attention(query, key, value, mask, scale=scale, causal=True)


def _with_window(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    if query.shape[1] == 1:
        return dense_attention(query, key[:, -window:], value[:, -window:], scale)
    mask = causal_mask(query.shape[1], key.shape[1], window, query.device)
    return block_sparse_attention(query, key, value, mask, scale=scale, causal=True)
