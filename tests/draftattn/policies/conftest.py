"""Attention calls with some structure, for policies to choose from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from draftattn import TokenGrid, block_layout
from draftattn.inputs import AttentionInputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


GRID = TokenGrid(4, 7, 9)


def make_call(
    grid: TokenGrid = GRID,
    tile: tuple[int, int, int] = (1, 4, 5),
    *,
    text: int = 0,
    lengths: list[int] | None = None,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> AttentionInputs:
    """A call of ragged blocks of at most 20 tokens; neighbouring tokens are alike, and attention is peaked."""
    layout = block_layout(grid, tile, block_size=20, num_text_tokens=text, device=DEVICE)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, layout.num_tokens, count, dim, generator=generator) for count in (heads, kv_heads, kv_heads)
    )
    blocks = torch.repeat_interleave(torch.arange(layout.num_blocks), layout.offsets.cpu().diff().long())
    shared = torch.randn(2, batch, layout.num_blocks, kv_heads, dim, generator=generator)[:, :, blocks]
    query = query + 1.5 * shared[0].repeat_interleave(heads // kv_heads, dim=2)
    key = key + 1.5 * shared[1]
    tensors = [x.to(DEVICE, dtype) for x in (query, key, value)]
    text_lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    return AttentionInputs(*tensors, layout, text_lengths)


@pytest.fixture(scope="session")
def call() -> Callable[..., AttentionInputs]:
    """Makes a call."""
    return make_call
