"""Attention probabilities reduced to pairs of blocks: what block selection is trained, searched and measured by."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from draftattn.kernels import reference
from draftattn.kernels.backends import reasons_against
from draftattn.kernels.block_mask import BlockMask

_CHUNK_SCORES = 2**24


def block_probabilities(
    query: Tensor,
    key: Tensor,
    block_mask: BlockMask,
    lse: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    reduce: Literal["max", "sum"] = "max",
    backend: Literal["auto", "reference", "triton"] = "auto",
) -> Tensor:
    r"""The probabilities of an attention call, reduced to one number per pair of blocks of the mask.

    With :math:`p_{ij} = \exp(\text{scale}\; q_i k_j - \text{lse}_i)` over the pairs of tokens that a query sees,
    ``"max"`` gives the largest of a pair of blocks, and ``"sum"`` the attention mass of the key block: the sum over its
    keys, averaged over all queries of the query block. Pairs outside the mask give 0, and so do queries that see
    nothing. Not differentiable, and free of the values: it costs about half of the attention itself.

    The LSE says what the probabilities are shares of. That of the same masked call gives masses that add up to 1 (less,
    where a residual took part); that of dense attention gives the recall of the mask. The block maximum is what
    SeerAttention (arXiv 2410.13276) trains its gates on, an LSE kept from an earlier step is how AdaSpa
    (arXiv 2502.21079) searches its blocks.

    Args:
        query: ``[B, S_q, H, D]``.
        key: ``[B, S_k, H_kv, D]``; ``H`` must be a multiple of ``H_kv``.
        block_mask: the pairs of blocks wanted, and which of their tokens are seen.
        lse: log-sum-exp of every query, ``[B, H, S_q]``, as `block_sparse_attention` returns it.
        scale: factor of the scores, ``D ** -0.5`` if None.
        causal: as in `block_sparse_attention`.
        reduce: ``"max"`` or ``"sum"``.
        backend: ``"triton"``, ``"reference"``, or ``"auto"`` for the first of them that can serve.

    Returns:
        float32 ``[B, H, Q, K]``.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or the backend asked for cannot serve.

    >>> from draftattn.kernels.api import block_sparse_attention
    >>> offsets = torch.tensor([0, 64, 96], dtype=torch.int32)
    >>> block_map = torch.tensor([[True, False], [True, True]])[None, None]
    >>> mask = BlockMask.from_block_map(block_map, offsets, offsets, block_size=64)
    >>> query, key, value = torch.randn(3, 1, 96, 2, 32).unbind()
    >>> _, lse = block_sparse_attention(query, key, value, mask, return_lse=True)
    >>> mass = block_probabilities(query, key, mask, lse, reduce="sum")
    >>> mass.shape, bool(mass[0, :, 0, 1].any()), torch.allclose(mass.sum(-1), torch.ones(1))
    (torch.Size([1, 2, 2, 2]), False, True)
    """
    _validate(query, key, block_mask, lse)
    if reduce not in ("max", "sum"):
        raise ValueError(f"reduce is {reduce!r}; choose max or sum")
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend is {backend!r}; choose from auto, reference, triton")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key, lse = query.detach(), key.detach(), lse.detach()
    reasons = [] if backend == "reference" else reasons_against("triton", query, key, key)
    if backend == "triton" and reasons:
        raise ValueError(f"backend 'triton' cannot serve this call: {'; '.join(reasons)}")
    if backend == "reference" or reasons:
        return block_probabilities_reference(
            query, key, block_mask, lse, scale=scale, causal=causal, maximum=reduce == "max"
        )
    from draftattn.kernels import triton_probabilities

    return triton_probabilities.block_probabilities(
        query, key, block_mask, lse, scale=scale, causal=causal, maximum=reduce == "max"
    )


def block_probabilities_reference(
    query: Tensor, key: Tensor, block_mask: BlockMask, lse: Tensor, *, scale: float, causal: bool, maximum: bool
) -> Tensor:
    """``block_probabilities`` in plain torch, in float32 (float64 for float64 inputs), some queries at a time."""
    batch, query_length, heads, _ = query.shape
    key_length, kv_heads = key.shape[1:3]
    num_query_blocks, num_key_blocks = block_mask.num_query_blocks, block_mask.num_key_blocks
    dtype = torch.promote_types(query.dtype, torch.float32)
    query_block = reference._block_of_token(block_mask.query_offsets[None], query_length).expand(batch, -1)
    key_block = reference._block_of_token(torch.atleast_2d(block_mask.key_offsets), key_length).expand(batch, -1)
    # [B, S_q], where queries stand among the keys, and the first key of their sequence
    position = reference._position_of_query(block_mask, query_block, key_length - query_length)
    window = block_mask.window
    starts = block_mask.key_offsets[..., :1] if window is None or window.starts is None else window.starts
    starts = reference._of_block(starts.expand(*starts.shape[:-1], num_query_blocks), query_block)
    # a spare last row and column, never chosen, stand for tokens outside every block
    chosen_map, whole_map = (
        torch.nn.functional.pad(x, (0, 1, 0, 1)) for x in (block_mask.block_map, block_mask.whole_map)
    )
    key_index = torch.arange(key_length, device=query.device)
    # a row that sees nothing has probabilities of 0
    lse = lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf)

    out = torch.zeros(batch, heads, num_query_blocks + 1, num_key_blocks + 1, dtype=dtype, device=query.device)
    rows = max(1, _CHUNK_SCORES // max(1, heads * key_length))
    for item in range(batch):
        # keys outside every block may hold anything, NaN too
        outside = (key_block[item] == num_key_blocks)[:, None, None]
        keys = key[item].to(dtype).masked_fill(outside, 0.0)
        column = key_block[item]
        for first in range(0, query_length, rows):
            part = slice(first, first + rows)
            queries = query[item, part].to(dtype).unflatten(1, (kv_heads, heads // kv_heads))
            scores = torch.einsum("qhgd,khd->hgqk", queries, keys).flatten(0, 1) * scale
            row = query_block[item, part]

            def of_tokens(block_map: Tensor, item: int = item, row: Tensor = row, column: Tensor = column) -> Tensor:
                """A block map of one item, for the tokens of this part and all heads."""
                block_map = block_map[item if block_map.shape[0] > 1 else 0][:, row][:, :, column]
                return block_map.repeat_interleave(heads // block_map.shape[0], dim=0)

            seen = of_tokens(chosen_map)
            standing = position[item, part, None]
            if causal:
                seen = seen & (key_index <= standing)
            if window is not None:
                near = (key_index > standing - window.size) | (key_index < starts[item, part, None] + window.sink)
                seen = seen & (near | of_tokens(whole_map))
            probabilities = torch.where(seen, (scores - lse[item, :, part, None]).exp(), 0.0)
            of_keys = _reduce_into(
                probabilities.new_zeros(heads, len(row), num_key_blocks + 1), column, probabilities, maximum
            )
            _reduce_into(out[item].transpose(1, 2), row, of_keys.transpose(1, 2), maximum)
    out = out[:, :, :-1, :-1]
    if not maximum:
        out = out / block_mask.query_offsets.diff().clamp(min=1)[:, None]
    return out.float()


def _reduce_into(total: Tensor, block: Tensor, x: Tensor, maximum: bool) -> Tensor:
    """Reduces the last dimension of ``x`` into the blocks ``[n]`` that its entries are in."""
    index = block.expand(x.shape)
    return total.scatter_reduce_(-1, index, x, "amax") if maximum else total.scatter_add_(-1, index, x)


def _validate(query: Tensor, key: Tensor, block_mask: BlockMask, lse: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim]; got shape {list(tensor.shape)}")
    batch, query_length, heads, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} differ in batch or head_dim")
    if key.dtype != query.dtype or not query.is_floating_point():
        raise ValueError(f"query and key must share a floating dtype; got {query.dtype} and {key.dtype}")
    if heads % key.shape[2]:
        raise ValueError(f"{heads} query heads cannot share {key.shape[2]} key heads evenly")
    if lse.shape != (batch, heads, query_length) or not lse.is_floating_point():
        raise ValueError(f"lse must be floating {[batch, heads, query_length]}; got {lse.dtype} {list(lse.shape)}")
    for name, device in (("key", key.device), ("lse", lse.device), ("block_mask", block_mask.device)):
        if device != query.device:
            raise ValueError(f"{name} is on {device}, query on {query.device}")
    mask_batch, mask_heads = block_mask.kv_num_blocks.shape[:2]
    if mask_batch not in (1, batch) or mask_heads not in (1, key.shape[2], heads):
        raise ValueError(
            f"block_mask is for batch {mask_batch} and {mask_heads} heads; query has batch {batch} and {heads} heads, "
            f"key {key.shape[2]} (or use 1)"
        )
