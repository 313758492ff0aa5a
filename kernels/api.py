"""The public function of the kernels: block-sparse attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from draftattn.kernels import operators, reference
from draftattn.kernels.backends import BackendName, choose_backend
from draftattn.kernels.block_mask import BlockMask


class BlockMeans(NamedTuple):
    """Mean key and mean value of every key block: what a skipped block contributes through (the *residual*).

    Both are ``[B, K, H_kv, D]``, in the dtype of the keys; ``draftattn.kernels.pooling.pool_blocks`` makes them.
    """

    key: Tensor
    value: Tensor


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    residual: BlockMeans | None = ...,
    return_lse: Literal[False] = ...,
    backend: BackendName = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    residual: BlockMeans | None = ...,
    return_lse: Literal[True],
    backend: BackendName = ...,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    causal: bool = False,
    residual: BlockMeans | None = None,
    return_lse: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention computed only over the block pairs of a mask.

    Row ``i`` of the output is :math:`\sum_j p_{ij} v_j` with :math:`p` the softmax of ``scale * query @ key.T`` over
    the keys of the chosen blocks. With ``residual``, every block ``b`` that the row skips takes part as one more key:
    its mean key with the weight of its ``n_b`` tokens, :math:`n_b \exp(\text{scale}\; q_i \bar k_b)`, and its mean
    value. Rows that attend to nothing give zeros and an LSE of ``-inf``; query rows outside every block give zeros.

    Args:
        query: ``[B, S_q, H, D]``. Any strides with a contiguous last dimension; nothing is copied.
        key: ``[B, S_k, H_kv, D]``; ``H`` must be a multiple of ``H_kv`` (grouped-query attention).
        value: ``[B, S_k, H_kv, D]``.
        block_mask: which key blocks each query block attends to, and which of their tokens.
        scale: factor of the scores, ``D ** -0.5`` if None.
        causal: query ``i`` sees the keys ``j <= i + S_k - S_q`` only (the last query sees all keys), or
            ``j <= i + shift`` with the mask's ``query_shifts``. Of the skipped blocks, the residual takes those that
            the query sees whole.
        residual: means of the key blocks, for skipped blocks to contribute through; None drops them.
        return_lse: also return the log-sum-exp of the scores (residual included), float32 ``[B, H, S_q]``.
        backend: ``"auto"`` for the fastest of our own that can serve, or one by name: ``"reference"``, ``"cpu"``,
            ``"triton"``, ``"hopper"``, ``"flex"`` (torch FlexAttention), ``"fa4"`` (where flash-attn-4 is installed).

    Returns:
        The output ``[B, S_q, H, D]`` in the query's dtype, and the LSE if asked for.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or the chosen backend cannot serve (the message
            names every reason).

    >>> import torch
    >>> offsets = torch.tensor([0, 64, 96], dtype=torch.int32)
    >>> block_map = torch.tensor([[True, False], [True, True]])[None, None]
    >>> mask = BlockMask.from_block_map(block_map, offsets, offsets, block_size=64)
    >>> query, key, value = torch.randn(3, 1, 96, 2, 32).unbind()
    >>> block_sparse_attention(query, key, value, mask).shape
    torch.Size([1, 96, 2, 32])
    """
    _validate(query, key, value, block_mask, residual)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    compiling = torch.compiler.is_compiling()  # then the operator chooses, when it runs
    chosen = backend if compiling else choose_backend(backend, query, key, value, residual, block_mask)
    run = _implementation(chosen)
    if operators.needs_operator(chosen, (query, key, value, *(residual or ()))):
        run = functools.partial(operators.attention, backend=chosen)
    output, lse = run(
        query, key, value, block_mask, scale=scale, causal=causal, residual=residual, return_lse=return_lse
    )
    if return_lse:
        assert lse is not None
        return output, lse
    return output


def _implementation(backend: BackendName) -> Callable[..., tuple[Tensor, Tensor | None]]:
    match backend:
        case "hopper":
            from draftattn.kernels import hopper

            return hopper.attention_forward
        case "triton":
            from draftattn.kernels import triton_forward

            return triton_forward.attention_forward
        case "cpu":
            from draftattn.kernels import cpu

            return cpu.attention_forward
        case "flex":
            from draftattn.kernels import flex

            return flex.attention_forward
        case "fa4":
            from draftattn.kernels import fa4

            return fa4.attention_forward
        case _:
            return reference.attention_forward


def _validate(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, residual: BlockMeans | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim]; got shape {list(tensor.shape)}")
        if tensor.dtype != query.dtype or not tensor.is_floating_point():
            raise ValueError(f"query, key and value must share a floating dtype; {name} is {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"query, key and value must be on one device; {name} is on {tensor.device}")
    batch, _, heads, head_dim = query.shape
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape; got {list(key.shape)} and {list(value.shape)}")
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} differ in batch or head_dim")
    if heads % key.shape[2]:
        raise ValueError(f"{heads} query heads cannot share {key.shape[2]} key heads evenly")
    if block_mask.device != query.device:
        raise ValueError(f"block_mask is on {block_mask.device}, query on {query.device}")
    mask_batch, mask_heads = block_mask.kv_num_blocks.shape[:2]
    if mask_batch not in (1, batch) or mask_heads not in (1, key.shape[2], heads):
        raise ValueError(
            f"block_mask is for batch {mask_batch} and {mask_heads} heads; query has batch {batch} and {heads} heads, "
            f"key {key.shape[2]} (or use 1)"
        )
    starts = None if block_mask.window is None else block_mask.window.starts
    per_item = (("key_offsets", block_mask.key_offsets), ("query_shifts", block_mask.query_shifts), ("starts", starts))
    for name, per_block in per_item:
        if per_block is not None and per_block.ndim == 2 and per_block.shape[0] != batch:
            raise ValueError(f"{name} is for {per_block.shape[0]} batch items; query has {batch}")
    if residual is not None:
        expected = (batch, block_mask.num_key_blocks, key.shape[2], head_dim)
        for name, means in (("key", residual.key), ("value", residual.value)):
            if tuple(means.shape) != expected or means.dtype != query.dtype or means.device != query.device:
                raise ValueError(
                    f"residual.{name} must be {list(expected)} {query.dtype} on {query.device}; got "
                    f"{list(means.shape)} {means.dtype} on {means.device}"
                )
