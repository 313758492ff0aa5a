"""Means over ragged blocks of tokens."""

from __future__ import annotations

from torch import Tensor


def pool_blocks(x: Tensor, offsets: Tensor, block_size: int = 128) -> Tensor:
    """Mean over the tokens of each block.

    Args:
        x: ``[B, S, H, D]``.
        offsets: int32 ``[N + 1]`` or ``[B, N + 1]``, ascending block boundaries within ``S``.
        block_size: the most tokens any block holds.

    Returns:
        float32 ``[B, N, H, D]`` (float64 for float64 inputs); blocks without tokens give zeros.

    >>> pool_blocks(torch.arange(6.0).view(1, 6, 1, 1), torch.tensor([0, 4, 6], dtype=torch.int32)).flatten().tolist()
    [1.5, 4.5]
    """
    return pool_blocks_reference(x, offsets)


def pool_blocks_reference(x: Tensor, offsets: Tensor) -> Tensor:
    """``pool_blocks`` in plain torch."""
    batch, _, heads, head_dim = x.shape
    raise NotImplementedError
