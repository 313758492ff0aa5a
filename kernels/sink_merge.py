"""Attention to the sinks before a sliding window, merged with the attention to the window."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.dispatch import triton_serves
from draftattn.kernels.rotary import turn_angles, turn_pairs

_ROWS = 8192  # queries whose part of the sinks plain torch computes at once


def merge_sinks(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_sinks: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    sink: int,
    window: int,
    scale: float | None = None,
) -> Tensor:
    """Adds the sinks of StreamingLLM (arXiv 2309.17453) to the attention of a sliding window. Differentiable.

    The query at position ``p`` of its text sees the sinks ``s < min(sink, p - window)`` besides its window. Rotary
    positions count as if the tokens between the two had never been: with ``f(p) = max(0, p - window - sink)`` tokens
    forgotten, the sinks stand ``f(p) - f(p_0)`` places further on than for the first query, at ``p_0``. Instead of
    them the query is turned, back by as much. Where no gradient is asked for, on a GPU one kernel reads all of it once.

    Args:
        output: ``[B, N, H, D]``, attention of the queries to their windows.
        lse: ``[B, H, N]`` of it; ``-inf`` where a query saw nothing.
        query: ``[B, N, H, D]``, rotated; any strides with a contiguous last dimension.
        key: ``[B, M, H_kv, D]``, rotated, sinks among them where they stand for the first query; ``H`` must be a
            multiple of ``H_kv``.
        value: like ``key``.
        first_sinks: int32 ``[B]``, where each item's sinks begin in ``key``. Those that some query sees must be there.
        positions: int32 ``[B]``, the first query's position in its text, negative in padding on the left.
        frequencies: float64 ``[r]``, the angles by which a position turns the pairs ``(x[i], x[i + r])``, ``2 r <= D``.
        sink: number of sinks, at least 1.
        window: tokens before a query that are not sinks for it.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        ``[B, N, H, D]`` in the dtype of ``output``; zeros where a query sees nothing at all.

    Raises:
        ValueError: if shapes do not fit together, or ``sink`` is not positive.

    One query after a window of one token, which it weighs as much as the only sink:

    >>> near, far = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 2.0])
    >>> zeros, first = torch.zeros(1, 1, 1, 2), torch.tensor([0], dtype=torch.int32)
    >>> output = merge_sinks(
    ...     near.view(1, 1, 1, 2), torch.zeros(1, 1, 1), zeros, zeros, far.view(1, 1, 1, 2), first, first + 2,
    ...     torch.ones(1, dtype=torch.float64), sink=1, window=1,
    ... )
    >>> output.flatten().tolist()
    [2.0, 1.0]
    """
    _validate(output, lse, query, key, value, first_sinks, positions, frequencies, sink)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = (output, lse, query, key, value)
    merge = merge_sinks_reference
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if triton_serves(query) and not wants_gradient and query.dtype != torch.float64:
        from draftattn.kernels import triton_sink_merge

        merge = triton_sink_merge.merge_sinks
    return merge(*tensors, first_sinks, positions, frequencies, sink=sink, window=window, scale=scale)


def merge_sinks_reference(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_sinks: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    sink: int,
    window: int,
    scale: float,
) -> Tensor:
    """``merge_sinks`` in plain torch."""
    length, device = query.shape[1], query.device
    dtype = torch.promote_types(query.dtype, torch.float32)
    sinks = torch.arange(sink, device=device)
    last = positions[:, None] + length - 1
    unused = (sinks >= last - window)[..., None, None]  # whatever stands there, for 0 * NaN is NaN
    index = (first_sinks[:, None] + sinks).clamp(max=key.shape[1] - 1)[..., None, None].expand(-1, -1, *key.shape[2:])
    key, value = (x.gather(1, index).to(dtype).masked_fill(unused, 0.0) for x in (key, value))
    merged = []
    for begin in range(0, max(1, length), _ROWS):
        rows = slice(begin, min(begin + _ROWS, length))
        position = positions[:, None] + torch.arange(rows.start, rows.stop, device=device)
        forgotten, forgotten_first = ((x - window - sink).clamp(min=0) for x in (position, positions[:, None]))
        cos, sin = turn_angles(forgotten_first - forgotten, frequencies, dtype)
        turned = turn_pairs(query[:, rows].to(dtype), cos[:, :, None], sin[:, :, None])
        scores = torch.einsum("bnkgd,bskd->bkgns", turned.unflatten(2, (key.shape[2], -1)), key) * scale
        seen = (sinks < position[..., None] - window)[:, None, None]  # [B, 1, 1, n, sink]
        near = lse[:, :, rows].unflatten(1, (key.shape[2], -1))
        # a query that sees nothing at all keeps its zeros
        near = near.masked_fill((near == -torch.inf) & ~seen.any(-1), 0.0)
        weights = torch.cat([near[..., None], scores.masked_fill(~seen, -torch.inf)], dim=-1).softmax(-1)
        far = torch.einsum("bkgns,bskd->bnkgd", weights[..., 1:], value).flatten(2, 3)
        kept = weights[..., 0].flatten(1, 2).transpose(1, 2)[..., None]
        merged.append((kept * output[:, rows].to(dtype) + far).to(output.dtype))
    return torch.cat(merged, dim=1)


def _validate(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_sinks: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    sink: int,
) -> None:
    batch, length, heads, head_dim = query.shape
    if output.shape != query.shape or lse.shape != (batch, heads, length):
        raise ValueError(
            f"output {list(output.shape)} and lse {list(lse.shape)} do not fit to query {list(query.shape)}"
        )
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != head_dim or heads % key.shape[2]:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit together"
        )
    if first_sinks.shape != (batch,) or positions.shape != (batch,):
        raise ValueError(
            f"first_sinks and positions must be [{batch}]; got {list(first_sinks.shape)} and {list(positions.shape)}"
        )
    if frequencies.ndim != 1 or 2 * len(frequencies) > head_dim or frequencies.dtype != torch.float64:
        raise ValueError(
            f"frequencies must be float64 [r] with 2 r <= {head_dim}; got {frequencies.dtype} {list(frequencies.shape)}"
        )
    if sink < 1:
        raise ValueError(f"sink is {sink}; allowed is 1 or more")
