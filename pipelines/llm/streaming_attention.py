"""Attention of several tokens at once to sinks and window, each token as if it had come alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.sink_merge import merge_sinks
from draftattn.pipelines.llm.causal_masks import causal_mask
from draftattn.pipelines.llm.dense import dense_attention
from draftattn.pipelines.llm.streaming_config import StreamingConfig
from draftattn.pipelines.llm.streaming_rotary import RotaryTurn


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
    a text is cut into chunks. The window is one call of the block-sparse kernel, and `merge_sinks` adds the sinks to
    it. What depends on lengths only is made once for all layers.

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
    if not seen and not any(paddings) and length <= config.size + 1:  # nothing is forgotten
        return dense_attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    # where each item's text begins among the last M keys
    starts = [max(0, before - (seen - num_kept)) for before in paddings]
    mask = causal_mask(
        length, num_kept + length, config.window + 1, query.device, tuple(starts) if any(starts) else (0,)
    )
    near = key[:, num_sinks:], value[:, num_sinks:]
    if not config.sink or seen + length - min(paddings, default=0) <= config.window + 1:  # no query is past its window
        return block_sparse_attention(query, *near, mask, scale=scale, causal=True)
    output, lse = block_sparse_attention(query, *near, mask, scale=scale, causal=True, return_lse=True)
    real_sinks = [min(num_sinks, max(0, seen - num_kept - before)) for before in paddings]
    first_sinks = [num_sinks - real + start for real, start in zip(real_sinks, starts, strict=True)]
    # once places are full, only the distance between queries counts
    positions = [min(seen - before, config.size) for before in paddings]
    return merge_sinks(
        output,
        lse,
        query,
        key,
        value,
        _ints(tuple(first_sinks), query.device),
        _ints(tuple(positions), query.device),
        turn.frequencies(query.device),
        sink=config.sink,
        window=config.window,
        scale=scale,
    )


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def _ints(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """``[B]`` on a device, without a wait for it."""
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)
