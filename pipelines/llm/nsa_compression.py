"""Compressed keys and values of Native Sparse Attention: one of each for every block of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from draftattn.pipelines.llm.nsa_config import NSAConfig


def count_compressed(num_tokens: int, config: NSAConfig) -> int:
    """How many compressed blocks lie wholly within the first ``num_tokens`` tokens.

    >>> [count_compressed(n, NSAConfig()) for n in (31, 32, 47, 48)]
    [0, 1, 1, 2]
    """
    return max(0, (num_tokens - config.compression_block) // config.compression_stride + 1)


def visible_compressed(first: int, num_queries: int, config: NSAConfig, device: torch.device) -> Tensor:
    """How many compressed blocks the queries from position ``first`` on see: those whose last token is not after them.

    Returns:
        int32 ``[num_queries]``.

    >>> visible_compressed(30, 3, NSAConfig(), torch.device("cpu")).tolist()
    [0, 1, 1]
    """
    end = torch.arange(first + 1, first + num_queries + 1, dtype=torch.int32, device=device)
    ended = torch.div(end - config.compression_block, config.compression_stride, rounding_mode="floor") + 1
    return ended.clamp(min=0)


def tokens_of(count: int, config: NSAConfig) -> int:
    """How many tokens ``count`` consecutive compressed blocks span; 0 for none.

    >>> tokens_of(1, NSAConfig()), tokens_of(3, NSAConfig())
    (32, 64)
    """
    return config.compression_stride * (count - 1) + config.compression_block if count else 0


class LinearCompression(nn.Module):
    r"""A linear map of each block of tokens, with weights of its own for each position and key head.

    Block ``i`` of key head ``h`` becomes :math:`\sum_r W_{hr}\,(x_{id + r} + e_{hr})` with stride ``d`` and offsets
    ``e``, which stand for the places in the block. Source: arXiv 2502.11089, equation 7. It starts as the block's mean.

    Args:
        num_heads: key heads.
        head_dim: channels of a head.
        config: block and stride.
        offsets: whether there are offsets; keys have them, values do not.
    """

    def __init__(self, num_heads: int, head_dim: int, config: NSAConfig, offsets: bool) -> None:
        super().__init__()
        self.stride = config.compression_stride
        identity = torch.eye(head_dim) / config.compression_block
        # [H_kv, block, D in, D out]
        self.weight = nn.Parameter(identity.expand(num_heads, config.compression_block, -1, -1).clone())
        self.offset = nn.Parameter(torch.zeros(num_heads, config.compression_block, head_dim)) if offsets else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, H_kv, D]`` to ``[B, C, H_kv, D]``, where the N tokens are just those of C blocks."""
        weight = self.weight.to(x.dtype)
        # blocks share tokens: a stretch of a stride is mapped once for each block that it lies in
        stretches = x.unflatten(1, (-1, self.stride))
        parts = weight.split(self.stride, dim=1)
        count = stretches.shape[1] - len(parts) + 1
        out = x.new_zeros(())
        for index, part in enumerate(parts):
            out = out + torch.einsum("bnrhd,hrde->bnhe", stretches[:, index : index + count], part)
        return out if self.offset is None else out + torch.einsum("hrd,hrde->he", self.offset.to(x.dtype), weight)


class MeanCompression(nn.Module):
    """The mean of each block of tokens; it learns nothing."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        self.stride, self.strides = config.compression_stride, config.compression_block // config.compression_stride

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, H_kv, D]`` to ``[B, C, H_kv, D]``, where the N tokens are just those of C blocks."""
        means = x.unflatten(1, (-1, self.stride)).mean(2, dtype=torch.promote_types(x.dtype, torch.float32))
        return means.unfold(1, self.strides, 1).mean(-1).to(x.dtype)


def make_compression(num_heads: int, head_dim: int, config: NSAConfig) -> tuple[nn.Module, nn.Module]:
    """The compressions of keys and of values that a config asks for."""
    if config.compression == "mean":
        return MeanCompression(config), MeanCompression(config)
    return (
        LinearCompression(num_heads, head_dim, config, offsets=True),
        LinearCompression(num_heads, head_dim, config, offsets=False),
    )
