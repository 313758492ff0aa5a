"""The arithmetic of rotary position embedding: turning channels in pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def turn_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``positions * frequencies``.

    Args:
        positions: ints of any shape ``[...]``.
        frequencies: float64 ``[r]``, on the same device.
        dtype: of the result.

    Returns:
        Two tensors ``[..., r]``.

    >>> quarter_turn = torch.tensor([torch.pi / 2], dtype=torch.float64)
    >>> cos, sin = turn_angles(torch.tensor([0, 4 * 10**9]), quarter_turn, torch.float32)
    >>> cos.flatten().tolist()
    [1.0, 1.0]
    """
    # float32 would lose the fraction of a turn after some ten thousand positions
    angles = positions.double()[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs ``(x[i], x[i + r])`` of the last dimension; channels past ``2 r`` stay.

    Args:
        x: ``[..., D]`` with ``D >= 2 r``.
        cos: ``[..., r]``, to be broadcast against ``x``.
        sin: like ``cos``.

    Returns:
        A tensor like ``x``; the product is taken in the dtype that ``x`` and ``cos`` promote to.

    >>> turn_pairs(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0]), torch.tensor([1.0])).tolist()
    [-2.0, 1.0, 3.0]
    """
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    moved = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    turned = torch.cat(moved, dim=-1).to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)
