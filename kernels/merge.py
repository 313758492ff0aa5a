"""Merging attention over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Attention over the union of disjoint sets of keys, from the results over each of them. Exact and differentiable.

    With the log-sum-exp :math:`l_i` of part :math:`i`, the merged one is :math:`l = \log \sum_i \exp l_i` and the
    output :math:`\sum_i \exp(l_i - l)\, o_i`. Gradients flow into the outputs and the LSEs of all parts. Source:
    FlashAttention's split over keys, arXiv 2307.08691, and RingAttention, arXiv 2310.01889.

    Args:
        outputs: of each part, ``[B, S_q, H, D]``, in one dtype; zeros where a part saw no key.
        lses: of each part, ``[B, H, S_q]``; ``-inf`` where it saw no key.

    Returns:
        The output ``[B, S_q, H, D]`` in the dtype of the parts, and the LSE ``[B, H, S_q]``. Rows that no part saw give
        zeros and ``-inf``.

    Raises:
        ValueError: if there are no parts, or their shapes or dtypes differ.

    Two keys of value 1, and one of value 4:

    >>> outputs, lses = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1, 1), torch.tensor([2.0, 1.0]).log().view(2, 1, 1, 1)
    >>> output, lse = merge_attention(outputs.unbind(), lses.unbind())
    >>> round(output.item(), 3), round(lse.exp().item(), 3)
    (2.0, 3.0)
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"got {len(outputs)} outputs and {len(lses)} LSEs; one of each per part, and at least one part"
        )
    batch, length, heads, _ = outputs[0].shape
    for index, (output, part_lse) in enumerate(zip(outputs, lses, strict=True)):
        if output.shape != outputs[0].shape or output.dtype != outputs[0].dtype:
            raise ValueError(
                f"outputs must share shape and dtype; part 0 is {list(outputs[0].shape)} {outputs[0].dtype}, part "
                f"{index} {list(output.shape)} {output.dtype}"
            )
        if part_lse.shape != (batch, heads, length):
            raise ValueError(f"the LSE of part {index} must be {[batch, heads, length]}; got {list(part_lse.shape)}")

    parts = torch.stack(list(lses))
    # -inf - -inf would give NaN, in the gradient too: rows that no part saw are merged as if their LSEs were 0
    blind = (parts == -torch.inf).all(0)
    parts = parts.masked_fill(blind, 0.0)
    lse = parts.logsumexp(0)
    weights = (parts - lse).exp().masked_fill(blind, 0.0)
    merged = sum(
        weight.transpose(1, 2)[..., None] * output.to(weight.dtype)
        for weight, output in zip(weights, outputs, strict=True)
    )
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), lse.masked_fill(blind, -torch.inf)
