"""Dense attention on the fastest kernel that computes it exactly."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from draftattn.kernels import fa4
from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.backends import reasons_against_hopper
from draftattn.kernels.block_mask import BlockMask

DenseBackend = Literal["auto", "hopper", "fa4", "cudnn", "flash", "torch"]

# Shorter sequences, such as the keys of cross-attention, leave too few tiles for a kernel that keeps its programs.
MIN_TOKENS = 4096
BLOCK_SIZE = 128
_TORCH = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def fastest_dense(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, backend: DenseBackend = "auto"
) -> Tensor:
    """Dense attention without a mask.

    ``"auto"`` takes the Hopper kernel of this repository with every block kept where it can serve and both sequences
    hold at least 4096 tokens, else torch's attention, which chooses for itself. FlashAttention-4 is taken only by name:
    it compiles on its first call.

    Args:
        query: ``[B, S, H, D]``.
        key: ``[B, S_k, H_kv, D]``; ``H`` a multiple of ``H_kv``.
        value: ``[B, S_k, H_kv, D]``.
        scale: factor of the scores, ``D ** -0.5`` if None.
        backend: the kernel: ``"hopper"``, ``"fa4"`` (flash-attn-4), ``"cudnn"`` or ``"flash"`` (torch's), ``"torch"``
            (whichever torch chooses), or ``"auto"``.

    Returns:
        ``[B, S, H, D]``.

    Raises:
        ValueError: if the backend asked for is unknown or cannot serve, with every reason.

    >>> query, key, value = torch.randn(3, 2, 10, 4, 16).unbind()
    >>> fastest_dense(query, key, value).shape
    torch.Size([2, 10, 4, 16])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = choose_dense(query, key, value, backend)
    if chosen == "hopper":
        mask = _every_block(query.shape[1], key.shape[1], query.device)
        return block_sparse_attention(query, key, value, mask, scale=scale, backend="hopper")
    if chosen == "fa4":
        return fa4.tile_attention(query, key, value, None, scale=scale, causal=False, return_lse=False)[0]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    if chosen == "torch":
        output = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
    else:
        with sdpa_kernel(_TORCH[chosen]):
            output = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2)


def choose_dense(query: Tensor, key: Tensor, value: Tensor, backend: DenseBackend = "auto") -> DenseBackend:
    """The kernel that will serve a call; see `fastest_dense`.

    Raises:
        ValueError: if the backend asked for is unknown or cannot serve, with every reason.
    """
    if backend == "auto":
        short = min(query.shape[1], key.shape[1]) < MIN_TOKENS
        return "torch" if short or reasons_against_dense("hopper", query, key, value) else "hopper"
    if reasons := reasons_against_dense(backend, query, key, value):
        raise ValueError(f"dense_backend {backend!r} cannot serve this call: {'; '.join(reasons)}")
    return backend


def reasons_against_dense(backend: DenseBackend, query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Every reason why a kernel cannot serve dense attention of these tensors; empty if it can."""
    if backend not in get_args(DenseBackend):
        raise ValueError(f"dense_backend is {backend!r}; choose from {', '.join(get_args(DenseBackend))}")
    if backend in ("auto", "torch"):
        return []
    if backend == "fa4":
        return fa4.reasons_against_fa4(query, key, value)
    if backend == "hopper":
        reasons = reasons_against_hopper(query, key, value)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            reasons.append("its gradients are slower than torch's")
        return reasons
    if query.device.type != "cuda":
        return [f"tensors are on {query.device.type}, it needs a CUDA device"]
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    call = cuda.SDPAParams(*heads_first, None, 0.0, False, query.shape[2] != key.shape[2])  # type: ignore
    serves = cuda.can_use_cudnn_attention(call) if backend == "cudnn" else cuda.can_use_flash_attention(call)
    return [] if serves else [f"torch's {backend} kernel refuses {_described(query)} with {_described(key)}"]


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def _every_block(query_length: int, key_length: int, device: torch.device) -> BlockMask:
    """A mask that keeps everything, one for all items and heads."""
    query_offsets, key_offsets = (
        torch.arange(0, length + BLOCK_SIZE, BLOCK_SIZE, dtype=torch.int32, device=device).clamp(max=length)
        for length in (query_length, key_length)
    )
    rows, columns = (-(-length // BLOCK_SIZE) for length in (query_length, key_length))
    counts = torch.full((1, 1, rows), columns, dtype=torch.int32, device=device)
    ids = torch.arange(columns, dtype=torch.int32, device=device).expand(1, 1, rows, columns).contiguous()
    return BlockMask(counts, ids, query_offsets[: rows + 1], key_offsets[: columns + 1], BLOCK_SIZE)
