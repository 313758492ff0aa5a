"""The branch of Native Sparse Attention that attends to compressed keys, and the blocks that it chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.compressed_scores import AlwaysChosen, compressed_block_scores
from draftattn.kernels.selection import select_largest
from draftattn.kernels.windows import visible_blocks
from draftattn.pipelines.llm.inputs import even_offsets
from draftattn.pipelines.llm.nsa_compression import visible_compressed
from draftattn.pipelines.llm.nsa_config import NSAConfig

_CHUNK_SCORES = 2**25
_FEWEST_GROUPS = 4  # of queries that see the same keys, below which plain torch does


def attend_compressed(
    query: Tensor, key: Tensor, value: Tensor, first: int, config: NSAConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the compressed keys of blocks that lie wholly in a query's past. Differentiable.

    Args:
        query: ``[B, N, H, D]``; query ``i`` stands at position ``first + i``.
        key: compressed keys ``[B, C, H_kv, D]``.
        value: compressed values ``[B, C, H_kv, D]``.
        first: position of the first query.
        config: block and stride of the compression.
        scale: factor of the scores.

    Returns:
        The output ``[B, N, H, D]``, zeros for queries that see no compressed key, and the log-sum-exp ``[B, H, N]``,
        ``-inf`` there.
    """
    stride, length = config.compression_stride, query.shape[1]
    # queries up to the next multiple of the stride see what the one before them sees, and so on in groups
    head = min(length, -(first + 1) % stride)
    groups = (length - head) // stride
    if not query.is_cuda or groups < _FEWEST_GROUPS or key.shape[1] == 0:
        return attend_in_rows(query, key, value, visible_compressed(first, length, config, query.device), scale)
    return attend_in_strides(query, key, value, first, config, scale)


def attend_in_rows(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked attention in plain torch, some queries at a time; query ``i`` sees the first ``visible[i]`` keys."""
    batch, length, heads, _ = query.shape
    count, kv_heads = key.shape[1:3]
    if count == 0 or length == 0:
        lse = query.new_full((batch, heads, length), -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
        return torch.zeros_like(query), lse
    column = torch.arange(count, device=query.device)
    rows = max(1, _CHUNK_SCORES // (batch * heads * count))
    outputs, lses = [], []
    for part in range(0, length, rows):
        queries = query[:, part : part + rows].unflatten(2, (kv_heads, -1))
        scores = torch.einsum("bthgd,bchd->bhgtc", queries, key)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
        seen = column < visible[part : part + rows, None]
        # a row that sees nothing would divide 0 by 0, in the gradient too
        blind = ~seen[:, :1]
        scores = scores.masked_fill(~seen & ~blind, -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp().masked_fill(blind, 0.0).to(value.dtype)
        outputs.append(torch.einsum("bhgtc,bchd->bthgd", weights, value).flatten(2, 3))
        lses.append(lse.masked_fill(blind, -torch.inf)[..., 0].flatten(1, 2))
    return torch.cat(outputs, 1), torch.cat(lses, -1)


def attend_in_strides(
    query: Tensor, key: Tensor, value: Tensor, first: int, config: NSAConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """The same as `attend_compressed` through the block-sparse kernel.

    Queries of a stride see the same compressed keys, and those of the next stride one more. So with the place in the
    stride as another dimension of heads, a causal call remains, over strides and compressed keys.
    """
    stride, length = config.compression_stride, query.shape[1]
    heads, count, kv_heads = query.shape[2], key.shape[1], key.shape[2]
    head = min(length, -(first + 1) % stride)
    groups = (length - head) // stride
    tail = head + groups * stride
    visible = visible_compressed(first, length, config, query.device)
    # a group's first query stands at stride * g - 1 and sees g - block / stride + 1 keys
    shift = (first + head + 1) // stride - config.compression_block // stride

    strided = query[:, head:tail].unflatten(1, (groups, stride)).flatten(2, 3)
    keys, values = (x[:, :, None].expand(-1, -1, stride, -1, -1).flatten(2, 3) for x in (key, value))
    query_offsets, key_offsets = (even_offsets(n, 128, query.device) for n in (groups, count))
    shifts = torch.full((query_offsets.shape[0] - 1,), shift, dtype=torch.int32, device=query.device)
    block_map = visible_blocks(query_offsets, key_offsets, shifts, causal=True)
    mask = BlockMask.from_block_map(block_map, query_offsets, key_offsets, query_shifts=shifts)
    output, lse = block_sparse_attention(strided, keys, values, mask, scale=scale, causal=True, return_lse=True)
    output = output.unflatten(2, (stride, heads)).flatten(1, 2)
    # [B, stride * H, groups] by token
    lse = lse.unflatten(1, (stride, kv_heads * (heads // kv_heads))).permute(0, 2, 3, 1).flatten(2, 3)
    if head == 0 and tail == length:
        return output, lse
    edges = [
        attend_in_rows(query[:, part], key, value, visible[part], scale) for part in (slice(0, head), slice(tail, None))
    ]
    return (
        torch.cat([edges[0][0], output, edges[1][0]], 1),
        torch.cat([edges[0][1].to(lse.dtype), lse, edges[1][1].to(lse.dtype)], -1),
    )


def select_blocks(
    query: Tensor, key: Tensor, lse: Tensor, first: int, num_keys: int, config: NSAConfig, scale: float
) -> BlockMask:
    """The blocks that each query attends to, shared by the query heads of a key head. Not differentiable.

    The initial and the local blocks are always among them, then come those of the largest scores
    (`compressed_block_scores`); of equal scores the earlier block.

    Args:
        query: ``[B, N, H, D]``; query ``i`` stands at position ``first + i``.
        key: compressed keys ``[B, C, H_kv, D]``.
        lse: their log-sum-exp, from `attend_compressed`.
        first: position of the first query.
        num_keys: keys of the sequence, ``first + N``.
        config: what to select.
        scale: factor of the scores.

    Returns:
        A mask with query blocks of one query each, for a causal call.
    """
    batch, length = query.shape[:2]
    kv_heads, stride, size = key.shape[2], config.compression_stride, config.block_size
    num_blocks = -(-num_keys // size)
    num_kept = min(config.num_selected, num_blocks)
    visible = visible_compressed(first, length, config, query.device)
    own = torch.arange(first, first + length, dtype=torch.int32, device=query.device) // size
    counts = torch.empty(batch, kv_heads, length, dtype=torch.int32, device=query.device)
    ids = torch.empty(batch, kv_heads, length, num_kept, dtype=torch.int32, device=query.device)
    rows = max(1, _CHUNK_SCORES // (batch * kv_heads * num_blocks))
    for start in range(0, length, rows):
        part = slice(start, start + rows)
        scores = compressed_block_scores(
            query[:, part], key, lse[:, :, part], visible[part], num_blocks, block_width=size // stride,
            key_width=config.compression_block // stride, scale=scale,
            always=AlwaysChosen(own[part], config.initial_blocks, config.local_blocks),
        )  # fmt: skip
        chosen = select_largest(scores, num_kept)
        counts[:, :, part], ids[:, :, part] = chosen.kv_num_blocks, chosen.kv_indices
    return BlockMask(
        kv_num_blocks=counts,
        kv_indices=ids,
        query_offsets=torch.arange(length + 1, dtype=torch.int32, device=query.device),
        key_offsets=even_offsets(num_keys, size, query.device),
        block_size=size,
        query_block_size=1,
    )
