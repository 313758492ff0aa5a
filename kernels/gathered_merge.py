"""Merging attention whose parts were computed for gathered queries, in an order of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.dispatch import triton_serves
from draftattn.kernels.merge import merge_attention


def merge_gathered(
    output: Tensor, lse: Tensor, parts: Tensor, part_lses: Tensor, place: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Merges one attention of every query with further ones that lie scattered in a list. Differentiable.

    Exact as `merge_attention`, without the copies that putting each part in the order of the queries would take: where
    no gradient is asked for, on a GPU one kernel reads every part once.

    Args:
        output: ``[B, N, H, D]``, any strides with a contiguous last dimension.
        lse: ``[B, H, N]``.
        parts: ``[T, D]``, attention of gathered pairs of a query and a head to other keys.
        part_lses: ``[T]``.
        place: int32 ``[B, H_kv, P, N, G]``, where in the list the P parts of each query and head are; ``H = H_kv * G``.
        out: takes the result; it may be ``output`` itself. Only where no gradient is asked for.

    Returns:
        ``[B, N, H, D]`` in the dtype of ``output``: ``out`` if it was given.

    Raises:
        ValueError: if shapes do not fit together, or ``out`` is given where a gradient is asked for.

    >>> output, lse = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), 2.0).log()
    >>> parts, part_lses = torch.tensor([[9.0], [4.0]]), torch.tensor([0.0, 0.0])
    >>> round(merge_gathered(output, lse, parts, part_lses, torch.ones(1, 1, 1, 1, 1, dtype=torch.int32)).item(), 3)
    2.0
    """
    batch, length, heads, head_dim = output.shape
    fits = place.ndim == 5 and (place.shape[0], place.shape[3], place.shape[1] * place.shape[4]) == output.shape[:3]
    if lse.shape != (batch, heads, length) or not fits:
        raise ValueError(
            f"output {list(output.shape)}, lse {list(lse.shape)} and place {list(place.shape)} do not fit together"
        )
    if parts.ndim != 2 or parts.shape[1] != head_dim or part_lses.shape != parts.shape[:1]:
        raise ValueError(f"parts must be [T, {head_dim}] and part_lses [T]; got {list(parts.shape)}")
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (output, lse, parts, part_lses))
    if out is not None and (wants_gradient or out.shape != output.shape or out.dtype != output.dtype):
        raise ValueError(
            f"out must be {list(output.shape)} {output.dtype}, where no gradient is asked for; got {list(out.shape)} "
            f"{out.dtype}"
        )
    if wants_gradient or not triton_serves(output) or output.dtype == torch.float64:
        merged = merge_gathered_reference(output, lse, parts, part_lses, place)
        return merged if out is None else out.copy_(merged)
    from draftattn.kernels import triton_gathered_merge

    return triton_gathered_merge.merge_gathered(output, lse, parts, part_lses, place, out)


def merge_gathered_reference(output: Tensor, lse: Tensor, parts: Tensor, part_lses: Tensor, place: Tensor) -> Tensor:
    """``merge_gathered`` in plain torch."""
    batch, length, heads, _ = output.shape
    # all at once: the gradient of every selection is as large as all parts
    slots = place.permute(2, 0, 3, 1, 4).flatten()
    outputs = parts.index_select(0, slots).view(-1, *output.shape)
    lses = part_lses.index_select(0, slots).view(-1, batch, length, heads).transpose(2, 3)
    return merge_attention([output, *outputs], [lse, *lses])[0]
