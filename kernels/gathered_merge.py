"""Merging attention whose parts were computed for gathered queries, in an order of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.dispatch import triton_serves
from draftattn.kernels.merge import merge_attention


def merge_gathered(output: Tensor, lse: Tensor, parts: Tensor, part_lses: Tensor, place: Tensor) -> Tensor:
    """Merges one attention of every query with further ones that lie scattered in a list. Differentiable.

    Exact as `merge_attention`, without the copies that putting each part in the order of the queries would take: where
    no gradient is asked for, on a GPU one kernel reads every part once.

    Args:
        output: ``[N, H, D]``, any strides with a contiguous last dimension.
        lse: ``[H, N]``.
        parts: ``[T, D]``, attention of gathered pairs of a query and a head to other keys.
        part_lses: ``[T]``.
        place: int64 ``[N, H, P]``, where in the list the parts of each query and head are.

    Returns:
        ``[N, H, D]`` in the dtype of ``output``.

    Raises:
        ValueError: if shapes do not fit together.

    >>> output, lse = torch.tensor([[[1.0]]]), torch.tensor([[2.0]]).log()
    >>> parts, part_lses = torch.tensor([[9.0], [4.0]]), torch.tensor([0.0, 0.0])
    >>> round(merge_gathered(output, lse, parts, part_lses, torch.tensor([[[1]]])).item(), 3)
    2.0
    """
    length, heads, head_dim = output.shape
    if lse.shape != (heads, length) or place.shape[:2] != (length, heads):
        raise ValueError(
            f"output {list(output.shape)}, lse {list(lse.shape)} and place {list(place.shape)} do not fit together"
        )
    if parts.ndim != 2 or parts.shape[1] != head_dim or part_lses.shape != parts.shape[:1]:
        raise ValueError(f"parts must be [T, {head_dim}] and part_lses [T]; got {list(parts.shape)}")
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (output, lse, parts, part_lses))
    if wants_gradient or not triton_serves(output) or output.dtype == torch.float64:
        return merge_gathered_reference(output, lse, parts, part_lses, place)
    from draftattn.kernels import triton_gathered_merge

    return triton_gathered_merge.merge_gathered(output, lse, parts, part_lses, place)


def merge_gathered_reference(output: Tensor, lse: Tensor, parts: Tensor, part_lses: Tensor, place: Tensor) -> Tensor:
    """``merge_gathered`` in plain torch."""
    slots = [slot.reshape(-1) for slot in place.unbind(-1)]
    outputs = [parts.index_select(0, slot).view(1, *output.shape) for slot in slots]
    lses = [part_lses.index_select(0, slot).view(1, *output.shape[:2]).transpose(1, 2) for slot in slots]
    return merge_attention([output[None], *outputs], [lse[None], *lses])[0][0]
