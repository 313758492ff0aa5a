"""Dense causal attention, on the fastest kernel that serves: what sparse systems fall back to where they do not pay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
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
        if num_queries == 1:
            return single_query_attention(q, k, v, scale)
        grouped = query.shape[2] != key.shape[2]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
    # torch aligns a causal mask at the top left, and a mask of its own would be N×K
    mask = causal_mask(num_queries, num_keys, None, query.device)
    return block_sparse_attention(query, key, value, mask, scale=scale, causal=True)


def single_query_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of one query of every item: a decoding step, no slower for a number of keys never met before.

    Args:
        query: ``[B, H, 1, D]``.
        key: ``[B, H_kv, K, D]``.
        value: ``[B, H_kv, K, D_v]``.
        scale: factor of the scores.
        mask: bool ``[B, 1, 1, K]``, the keys that are seen; None for all.

    Returns:
        ``[B, 1, H, D_v]``.

    >>> query, key = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 3, 8)
    >>> value = torch.tensor([1.0, 2.0, 6.0])[:, None].expand(1, 2, 3, 8)
    >>> mask = torch.tensor([False, True, True])[None, None, None]
    >>> for seen in (None, mask):
    ...     single_query_attention(query, key, value, 1.0, seen).mean().item()
    3.0
    4.0
    """
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = heads != kv_heads
    if grouped and mask is not None:  # no kernel of torch's takes both; a group's heads can be queries of one head
        query, grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim), False
    with without_cudnn():
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return output.reshape(batch, 1, heads, value.shape[-1])


class _CudnnSwitch:
    """torch's switch of cuDNN's attention, which is one for the process: the last thread to leave puts it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = True

    def enter(self) -> None:
        flags = torch.backends.cuda
        with self._lock:
            if not self._inside:
                self._before = flags.cudnn_sdp_enabled()
            self._inside += 1
            others = flags.flash_sdp_enabled() or flags.mem_efficient_sdp_enabled()
            flags.enable_cudnn_sdp(self._before and not others)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


_switch = _CudnnSwitch()


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Within it torch's attention on a GPU leaves cuDNN's kernels out, unless the other fast ones are switched off.

    They are the fastest for a prompt. But cuDNN builds a plan for every number of keys that it has not met, which takes
    tens of milliseconds, and a decoding step has always one key more than the last. The switch is the process's: other
    threads do without cuDNN meanwhile. While torch compiles, which cannot trace it, it does nothing.

    >>> with without_cudnn():
    ...     torch.backends.cuda.cudnn_sdp_enabled()
    False
    """
    if torch.compiler.is_compiling():
        yield
        return
    _switch.enter()
    try:
        yield
    finally:
        _switch.leave()


def _with_window(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    if query.shape[1] == 1:
        return dense_attention(query, key[:, -window:], value[:, -window:], scale)
    mask = causal_mask(query.shape[1], key.shape[1], window, query.device)
    return block_sparse_attention(query, key, value, mask, scale=scale, causal=True)
