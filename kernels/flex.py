"""Block-sparse attention by torch's FlexAttention: serves every mask, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from draftattn.kernels.even_blocks import TILE, for_each_head, reasons_against_even, span, tile_lists

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    from draftattn.kernels.api import BlockMeans
    from draftattn.kernels.block_mask import BlockMask

MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# Masks differ in closures and shapes, and each is compiled by itself.
_RECOMPILE_LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"


def reasons_against_flex(
    query: Tensor, key: Tensor, value: Tensor, residual: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Every reason why FlexAttention cannot serve these tensors; empty if it can."""
    reasons = []
    if query.device.type == "cuda":
        if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            reasons.append(f"dtype {query.dtype} is not fp16, bf16 or fp32")
        if query.shape[-1] < 16:
            reasons.append(f"head_dim {query.shape[-1]} is smaller than 16")
    elif query.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *(residual or ()))):
            reasons.append("it has no backward pass on a CPU")
    else:
        reasons.append(f"tensors are on {query.device.type}, it needs CUDA, ROCm or the CPU")
    return reasons


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    causal: bool,
    residual: BlockMeans | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention with the mask as its block lists, and a rule for single tokens where blocks are ragged.

    See ``draftattn.kernels.api.block_sparse_attention`` for the arguments. Compiled on a GPU, once for a kind of call;
    on a CPU it runs uncompiled, materialises all scores and is for checking. New offsets make it wait for the device
    once. The residual's means are more keys, so it copies keys and values. Source: FlexAttention, arXiv 2412.05496.
    """
    batch, query_length, heads, _ = query.shape
    key_length = key.shape[1]
    if query.numel() == 0:
        return torch.zeros_like(query), query.new_zeros(batch, heads, query_length, dtype=torch.float32)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *(residual or ())))
    options: dict[str, Any] = {"query_length": query_length, "key_length": key_length, "heads": heads, "causal": causal}
    score_rule = None
    if residual is None and query.is_cuda and not reasons_against_even(block_mask, query_length, key_length):
        mask = even_mask(block_mask, **options, transposed=needs_gradient)
    else:
        query, key, value = _without_outside(query, key, value, block_mask)
        if residual is not None:
            score_rule = _weight_of_means(block_mask.key_offsets, key_length)
            key, value = torch.cat([key, residual.key], dim=1), torch.cat([value, residual.value], dim=1)
        mask = ragged_mask(block_mask, **options, with_means=residual is not None, transposed=needs_gradient)
    output, lse = run(query, key, value, mask, score_rule, scale=scale, return_lse=return_lse)
    return output, lse


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: FlexBlockMask | None,
    score_rule: ScoreRule | None = None,
    *,
    scale: float,
    return_lse: bool = False,
    options: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention on ``[B, S, H, D]`` tensors, compiled on a GPU.

    Args:
        query: ``[B, S_q, H, D]``.
        key: ``[B, S_k, H_kv, D]``.
        value: ``[B, S_k, H_kv, D]``.
        mask: torch's mask, such as of `even_mask`; None for dense.
        score_rule: torch's ``score_mod``.
        scale: factor of the scores.
        return_lse: also return the LSE, float32 ``[B, H, S_q]``.
        options: torch's ``kernel_options``.
    """
    arguments: dict[str, Any] = {"score_mod": score_rule, "block_mask": mask, "scale": scale}
    arguments["enable_gqa"] = query.shape[2] != key.shape[2]
    if query.is_cuda:
        # the kernel for few queries knows fewer kinds of masks
        arguments["kernel_options"] = {"FORCE_USE_FLEX_ATTENTION": True, **(options or {})}
    if return_lse:
        if hasattr(torch_flex, "AuxRequest"):
            arguments["return_aux"] = torch_flex.AuxRequest(lse=True)
        else:
            arguments["return_lse"] = True
    with torch._dynamo.config.patch({_RECOMPILE_LIMIT: 1024}):
        result = _compiled(query.is_cuda)(*(x.transpose(1, 2) for x in (query, key, value)), **arguments)
    if not return_lse:
        return result.transpose(1, 2), None
    output, extra = result
    return output.transpose(1, 2), extra.lse if hasattr(extra, "lse") else extra


@functools.cache
def _compiled(on_gpu: bool) -> Callable[..., Any]:
    # Whole graphs only: outside a graph FlexAttention would quietly materialise all scores on a GPU.
    return torch.compile(
        torch_flex.flex_attention, backend="inductor" if on_gpu else "eager", fullgraph=True, dynamic=False
    )


def even_mask(
    block_mask: BlockMask,
    *,
    query_length: int,
    key_length: int,
    heads: int,
    causal: bool = False,
    transposed: bool = False,
) -> FlexBlockMask:
    """Torch's mask for whole 128-token blocks: no rule for single tokens but on the diagonal.

    For a GPU: uncompiled FlexAttention reads only rules, not lists of blocks.

    Args:
        block_mask: a mask for which `reasons_against_even` finds nothing.
        query_length: tokens of the query.
        key_length: tokens of the key.
        heads: query heads.
        causal: hide later keys.
        transposed: also make the lists of query blocks that a backward pass needs.
    """
    shift = key_length - query_length

    def is_visible(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return key_index <= query_index + shift

    rule = is_visible if causal else torch_flex.noop_mask
    if transposed:
        full, partial = _tile_maps(block_mask, query_length, key_length, causal, key_length)
        return _from_maps(partial, full, rule, (query_length, key_length), heads, transposed)
    lists = for_each_head(tile_lists(block_mask, query_length, key_length, causal), heads)
    # torch's kernel finds the rows of both lists by the strides of the first
    width = lists.full_ids.shape[-1] - lists.partial_ids.shape[-1]
    lists = lists._replace(
        partial_ids=torch.nn.functional.pad(lists.partial_ids, (0, width)), full_ids=lists.full_ids.contiguous()
    )
    return torch_flex.BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=TILE, mask_mod=rule, seq_lengths=(query_length, key_length), compute_q_blocks=False
    )


def ragged_mask(
    block_mask: BlockMask,
    *,
    query_length: int,
    key_length: int,
    heads: int,
    causal: bool = False,
    with_means: bool = False,
    transposed: bool = False,
) -> FlexBlockMask:
    """Torch's mask for any `BlockMask`: its tiles that hold any chosen token pair, and a rule that reads the blocks.

    Made on the mask's device without a host sync. With ``with_means``, as many keys as there are key blocks follow
    the tokens, one mean for each, and a query sees those of the blocks that it skips.

    The other arguments are as in `even_mask`.
    """
    device = block_mask.device
    num_blocks = block_mask.num_key_blocks
    key_offsets = torch.atleast_2d(block_mask.key_offsets)
    # [S_q] and [B | 1, S_k]: 0 before the first block, then the block's number from 1, one more after the last
    query_block = _block_of_token(block_mask.query_offsets[None], query_length)[0]
    key_column = _block_of_token(key_offsets, key_length)
    key_last = torch.arange(key_length, dtype=torch.int32, device=device).expand(key_column.shape[0], -1)
    # [B | 1, H | 1, Q + 2, K + 2]: tokens outside every block are in no pair
    chosen = torch.nn.functional.pad(block_mask.block_map, (1, 1, 1, 1))
    whole = None
    if block_mask.window is not None:
        whole = torch.nn.functional.pad(block_mask.whole_map, (1, 1, 1, 1))
    if with_means:
        has_tokens = key_offsets.diff(dim=-1) > 0
        skipped = torch.nn.functional.pad(~block_mask.block_map & has_tokens[:, None, None], (0, 0, 1, 1))
        chosen = torch.cat([chosen.expand(skipped.shape[0], -1, -1, -1), skipped], dim=-1)
        columns = torch.arange(num_blocks + 2, 2 * num_blocks + 2, dtype=torch.int32, device=device)
        key_column = torch.cat([key_column, columns.expand(key_column.shape[0], -1)], dim=1)
        key_last = torch.cat([key_last, key_offsets[:, 1:] - 1], dim=1)
        if whole is not None:
            whole = torch.nn.functional.pad(whole, (0, num_blocks), value=True)

    # [B | 1, S_q]: where queries stand among the keys
    position = torch.arange(query_length, dtype=torch.int32, device=device)[None]
    if block_mask.query_shifts is None:
        position = position + (key_length - query_length)
    else:
        position = position + _of_block(block_mask.query_shifts, query_block)
    sink_end = None
    if block_mask.window is not None:
        starts = block_mask.key_offsets[..., :1] if block_mask.window.starts is None else block_mask.window.starts
        starts = starts.expand(*starts.shape[:-1], block_mask.num_query_blocks)
        sink_end = _of_block(starts, query_block) + block_mask.window.sink
    rule = _token_rule(
        chosen,
        query_block,
        key_column,
        heads=heads,
        position=position if causal or whole is not None else None,
        key_last=key_last if causal else None,
        whole=whole,
        window=0 if block_mask.window is None else block_mask.window.size,
        sink_end=sink_end,
    )
    total = key_column.shape[1]
    full, partial = _tile_maps(block_mask, query_length, key_length, causal, total)
    return _from_maps(partial, full, rule, (query_length, total), heads, transposed)


def _token_rule(
    chosen: Tensor,
    query_block: Tensor,
    key_column: Tensor,
    *,
    heads: int,
    position: Tensor | None,
    key_last: Tensor | None,
    whole: Tensor | None,
    window: int,
    sink_end: Tensor | None,
) -> MaskRule:
    """Whether a query sees a key, by the blocks that both are in.

    Tensors that all batch items share have a first dimension of 1, and every batch index times 0 reads it.
    """
    group = heads // chosen.shape[1]
    of_map, of_key = (int(x.shape[0] > 1) for x in (chosen, key_column))
    of_query = int(position is not None and position.shape[0] > 1)
    of_sink = int(sink_end is not None and sink_end.shape[0] > 1)

    def is_visible(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        row, column = query_block[query_index], key_column[batch * of_key, key_index]
        seen = chosen[batch * of_map, head // group, row, column]
        if position is not None and key_last is not None:
            seen = seen & (key_last[batch * of_key, key_index] <= position[batch * of_query, query_index])
        if whole is not None and position is not None and sink_end is not None:
            near = key_index > position[batch * of_query, query_index] - window
            near = near | (key_index < sink_end[batch * of_sink, query_index])
            of_whole = 0 if whole.shape[0] == 1 else 1
            seen = seen & (near | whole[batch * of_whole, head // group, row, column])
        return seen

    return is_visible


def _tile_maps(
    block_mask: BlockMask, query_length: int, key_length: int, causal: bool, total: int
) -> tuple[Tensor, Tensor]:
    """Which of torch's 128 × 128 tiles need no rule for single tokens, and which of the others are needed.

    Both are bool ``[B | 1, H | 1, ceil(S_q / 128), ceil(total / 128)]``; keys from ``key_length`` on are means.
    """
    device = block_mask.device
    key_offsets = torch.atleast_2d(block_mask.key_offsets)
    chosen = torch.nn.functional.pad(block_mask.block_map, (1, 1, 1, 1))
    batch = max(chosen.shape[0], key_offsets.shape[0])
    # [B, H, Q + 3, K + 3]: how many pairs are chosen above and left of each corner
    sums = torch.nn.functional.pad(chosen.int().cumsum(-1).cumsum(-2), (1, 0, 1, 0)).expand(batch, -1, -1, -1)

    def blocks_of_tiles(offsets: Tensor, length: int) -> tuple[Tensor, Tensor]:
        block = _block_of_token(offsets, length)
        first = torch.arange(0, length, TILE, device=device)
        return block[:, first], block[:, (first + TILE - 1).clamp(max=length - 1)]

    row_first, row_last = (x[0] for x in blocks_of_tiles(block_mask.query_offsets[None], query_length))
    column_first, column_last = blocks_of_tiles(key_offsets, key_length)
    upper, lower = sums[:, :, row_first], sums[:, :, row_last + 1]

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return rows.gather(-1, columns[:, None, None].expand(batch, *rows.shape[1:3], -1))

    count = at(lower, column_last + 1) - at(lower, column_first) - at(upper, column_last + 1) + at(upper, column_first)
    area = (row_last - row_first + 1)[:, None] * (column_last - column_first + 1)[:, None, None]
    needed = count > 0
    full = needed & (count == area)
    if block_mask.window is not None:
        full = torch.zeros_like(full)
    if causal:
        if block_mask.query_shifts is None:
            first_query = torch.arange(0, query_length, TILE, device=device)[:, None]
            first_key = torch.arange(0, key_length, TILE, device=device)
            shift = key_length - query_length
            full &= (first_key + TILE).clamp(max=key_length) - 1 <= first_query + shift
            needed &= first_key <= (first_query + TILE).clamp(max=query_length) - 1 + shift
        else:
            full = torch.zeros_like(full)
    partial = needed & ~full
    num_tiles = -(-total // TILE)
    # means follow the tokens, perhaps in the tile of the last ones, and always need the rule
    holds_means = (torch.arange(num_tiles, device=device) >= key_length // TILE) & (total > key_length)
    partial, full = (torch.nn.functional.pad(x, (0, num_tiles - x.shape[-1])) for x in (partial, full))
    return full & ~holds_means, partial | holds_means


def _from_maps(
    partial: Tensor, full: Tensor, rule: MaskRule, lengths: tuple[int, int], heads: int, transposed: bool
) -> FlexBlockMask:
    if full.shape[1] not in (1, heads):
        partial, full = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (partial, full))
    counts, ids = _lists(partial)
    full_counts, full_ids = _lists(full)
    query_counts, query_ids = _lists(partial.transpose(-1, -2)) if transposed else (None, None)
    full_query_counts, full_query_ids = _lists(full.transpose(-1, -2)) if transposed else (None, None)
    return torch_flex.BlockMask(
        lengths,
        kv_num_blocks=counts,
        kv_indices=ids,
        full_kv_num_blocks=full_counts,
        full_kv_indices=full_ids,
        q_num_blocks=query_counts,
        q_indices=query_ids,
        full_q_num_blocks=full_query_counts,
        full_q_indices=full_query_ids,
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=rule,
    )


def _lists(tile_map: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ascending ids of the true entries of each row."""
    from draftattn.kernels.block_mask import BlockMask

    nothing = tile_map.new_zeros(max(tile_map.shape[-2:]) + 1, dtype=torch.int32)
    rows, columns = (nothing[: size + 1] for size in tile_map.shape[-2:])
    mask = BlockMask.from_block_map(tile_map, rows, columns)
    return mask.kv_num_blocks, mask.kv_indices


def _without_outside(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros in place of tokens outside every block: they may hold anything, NaN too, and 0 * NaN would spread it."""

    def zeroed(x: Tensor, offsets: Tensor, num_blocks: int) -> Tensor:
        block = _block_of_token(offsets, x.shape[1])
        return x.masked_fill(((block == 0) | (block > num_blocks))[:, :, None, None], 0.0)

    found = span(block_mask.query_offsets)
    if (found.start, found.end) != (0, query.shape[1]):
        query = zeroed(query, block_mask.query_offsets[None], block_mask.num_query_blocks)
    offsets = block_mask.key_offsets
    if offsets.ndim == 2 or (span(offsets).start, span(offsets).end) != (0, key.shape[1]):
        offsets = torch.atleast_2d(offsets)
        key, value = (zeroed(x, offsets, block_mask.num_key_blocks) for x in (key, value))
    return query, key, value


def _weight_of_means(key_offsets: Tensor, key_length: int) -> ScoreRule:
    """Adds the logarithm of a block's number of tokens to the score of its mean."""
    lengths = torch.atleast_2d(key_offsets).diff(dim=-1)
    # bias of each token and mean
    bias = torch.nn.functional.pad(lengths.clamp(min=1).float().log(), (key_length, 0))
    of_batch = int(bias.shape[0] > 1)

    def weighted(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return score + bias[batch * of_batch, key_index]

    return weighted


def _block_of_token(offsets: Tensor, length: int) -> Tensor:
    """Int32 ``[B | 1, length]``: 0 before the first block, the block's number from 1, one more after the last."""
    token = torch.arange(length, device=offsets.device, dtype=offsets.dtype).expand(offsets.shape[0], -1)
    return torch.searchsorted(offsets.contiguous(), token.contiguous(), right=True, out_int32=True)


def _of_block(per_block: Tensor, block: Tensor) -> Tensor:
    """Values ``[Q]`` or ``[B, Q]`` of the blocks ``[S]`` that tokens are in; 0 outside every block."""
    return torch.nn.functional.pad(torch.atleast_2d(per_block), (1, 1))[:, block]
