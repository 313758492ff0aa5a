"""Attention of several tokens at once to sinks and window, each token as if it had come alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.merge import merge_attention
from draftattn.kernels.windows import sliding_window_mask
from draftattn.pipelines.llm.streaming_config import StreamingConfig
from draftattn.pipelines.llm.streaming_rotary import RotaryTurn

_ROWS = 8192  # queries whose part of the sinks is computed at once
_BLOCK = 128


def streaming_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: StreamingConfig,
    turn: RotaryTurn,
    *,
    seen: int,
    num_sinks: int,
    padding: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """StreamingLLM (arXiv 2309.17453) for a chunk of a text, in time linear in its length. Differentiable.

    The token at position ``p`` sees the tokens ``p - window`` to ``p``, and of those before them the first ``sink``,
    as if the others between had never been: these stand right before the window. So the result does not depend on how
    a text is cut into chunks. The window is one call of the block-sparse kernel; for the sinks every query is turned
    back by the number of tokens that it no longer sees, and the two parts are merged by their LSE.

    Args:
        query: ``[B, N, H, D]``, rotated.
        key: ``[B, num_sinks + M, H_kv, D]``, rotated: sinks, where they stand for the first query, and the last ``M``
            tokens, the ``N`` new ones among them.
        value: like ``key``.
        config: what a token sees.
        turn: the model's rotary embedding.
        seen: tokens before the first query, padding included.
        num_sinks: sinks in front of the keys. Where there are fewer than ``config.sink``, the others are still among
            the last ``M`` tokens.
        padding: tokens of left padding of every item.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        ``[B, N, H, D]``; zeros for padding.
    """
    batch, length = query.shape[:2]
    paddings = [0] * batch if padding is None else list(padding)
    num_kept = key.shape[1] - num_sinks - length
    device = query.device
    # where each item's text begins among the last M keys
    starts = [max(0, before - (seen - num_kept)) for before in paddings]
    mask = sliding_window_mask(
        _offsets(0, length, device),
        torch.stack([_offsets(start, num_kept + length, device) for start in starts])
        if any(starts)
        else _offsets(0, num_kept + length, device),
        config.window + 1,
        query_shifts=torch.full((-(-length // _BLOCK),), num_kept, dtype=torch.int32, device=device),
        max_blocks_per_row=-(-config.window // _BLOCK) + 2,
    )
    near = key[:, num_sinks:], value[:, num_sinks:]
    first = max(0, config.window + 1 + min(paddings) - seen)  # earlier queries have all of their text in the window
    if not config.sink or first >= length:
        return block_sparse_attention(query, *near, mask, scale=scale, causal=True)
    output, lse = block_sparse_attention(query, *near, mask, scale=scale, causal=True, return_lse=True)
    real_sinks = [min(num_sinks, max(0, seen - num_kept - before)) for before in paddings]
    sink_starts = [num_sinks - real + start for real, start in zip(real_sinks, starts, strict=True)]
    sinks = [_run_of_items(x, sink_starts, config.sink) for x in (key, value)]
    parts = [output[:, :first]]
    before = torch.tensor(paddings, device=device)[:, None]
    for begin in range(first, length, _ROWS):
        rows = slice(begin, min(begin + _ROWS, length))
        position = torch.arange(seen + rows.start, seen + rows.stop, device=device) - before
        part = _attend_to_sinks(query[:, rows], sinks[0], sinks[1], position, seen - before, config, turn, scale)
        parts.append(merge_attention([output[:, rows], part[0]], [lse[:, :, rows], part[1]])[0])
    return torch.cat(parts, dim=1)


def _attend_to_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    first_position: Tensor,
    config: StreamingConfig,
    turn: RotaryTurn,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of queries ``[B, n, H, D]`` at ``position`` ``[B, n]`` over the sinks before their window."""
    away = [(x - config.size).clamp(min=0) for x in (position, first_position)]
    dtype = torch.promote_types(query.dtype, torch.float32)
    turned = turn(query.to(dtype), away[1] - away[0]).unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("bnkgd,bskd->bkgns", turned, key.to(dtype))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    sink = torch.arange(key.shape[1], device=query.device)
    seen = sink < position[..., None] - config.window  # [B, n, sink]
    seen = seen[:, None, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    blind = ~seen.any(-1)
    lse = scores.masked_fill(blind[..., None], 0.0).logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(~seen, 0.0)
    output = torch.einsum("bkgns,bskd->bnkgd", weights, value.to(dtype)).flatten(2, 3)
    return output.to(query.dtype), lse.masked_fill(blind, -torch.inf).flatten(1, 2)


def _offsets(start: int, end: int, device: torch.device) -> Tensor:
    """Blocks of the tokens ``start : end``, as many as there would be without ``start``."""
    blocks = torch.arange(-(-end // _BLOCK) + 1, dtype=torch.int32, device=device) * _BLOCK
    return (blocks + start).clamp_(max=end)


def _run_of_items(x: Tensor, starts: Sequence[int], count: int) -> Tensor:
    """``count`` tokens of ``x`` ``[B, N, H, D]`` from each item's own start; the last one again past the end."""
    index = torch.tensor(starts, device=x.device)[:, None] + torch.arange(count, device=x.device)
    index = index.clamp_(max=x.shape[1] - 1)[..., None, None].expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
