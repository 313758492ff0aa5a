"""Named attention shapes, and random block masks for them, to measure kernels on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.block_mask import BlockMask
from draftattn.layout import BlockLayout, TokenGrid, block_layout

BLOCK_SIZE = 128
Rows = Literal["even", "uneven"]


@dataclass(frozen=True)
class KernelShape:
    """An attention call to measure.

    Args:
        name: what it is called.
        heads: query heads.
        kv_heads: key heads.
        tokens: tokens of query and key, in blocks of 128, the last one perhaps shorter.
        head_dim: channels of a head.
        causal: whether a query sees no later keys.
        grid: the video that the shape comes from, for ragged blocks; None where there is none.
        num_text_tokens: text tokens after the video, with ragged blocks.
        real_blocks: take the ragged blocks of the grid instead of whole ones; ``tokens`` then follows from the grid.

    >>> KERNEL_SHAPES["wan-1.3b-480p"].tokens, KERNEL_SHAPES["wan-1.3b-480p"].with_real_blocks().tokens
    (32768, 32760)
    """

    name: str
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int = 128
    causal: bool = False
    grid: TokenGrid | None = None
    num_text_tokens: int = 0
    real_blocks: bool = False

    def __post_init__(self) -> None:
        for label in ("heads", "kv_heads", "tokens", "head_dim"):
            if getattr(self, label) < 1:
                raise InputError(f"{label.replace('_', '-')} is {getattr(self, label)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} heads cannot share {self.kv_heads} kv-heads evenly")

    def with_real_blocks(self) -> KernelShape:
        """The shape with the ragged blocks of its video.

        Raises:
            InputError: if it comes from no video.
        """
        if self.grid is None:
            named = ", ".join(name for name, shape in KERNEL_SHAPES.items() if shape.grid is not None)
            raise InputError(f"shape {self.name!r} comes from no video; real blocks exist for {named}")
        return replace(self, tokens=self.grid.num_tokens + self.num_text_tokens, real_blocks=True)

    def layout(self, device: torch.device | str = "cpu") -> BlockLayout:
        """The blocks of the sequence; whole ones are laid out as frames of 8 × 16 tokens.

        Raises:
            InputError: if whole blocks do not divide the tokens, so that no video of them exists.
        """
        if self.real_blocks and self.grid is not None:
            return block_layout(self.grid, num_text_tokens=self.num_text_tokens, device=device)
        if self.tokens % BLOCK_SIZE:
            raise InputError(f"{self.tokens} tokens are not a multiple of {BLOCK_SIZE}")
        return block_layout(TokenGrid(self.tokens // BLOCK_SIZE, 8, 16), (1, 8, 16), device=device)

    def offsets(self, device: torch.device | str) -> Tensor:
        """Block boundaries, int32 ``[N + 1]``."""
        if self.real_blocks:
            return self.layout(device).offsets
        num_blocks = -(-self.tokens // BLOCK_SIZE)
        ends = torch.arange(num_blocks + 1, dtype=torch.int32, device=device) * BLOCK_SIZE
        return ends.clamp_(max=self.tokens)

    def small(self) -> KernelShape:
        """A shape of the same kind with about a thousand tokens, to check kernels on."""
        kv_heads = min(2, self.kv_heads)
        small = replace(
            self, name=f"{self.name}, small", heads=kv_heads * self.heads // self.kv_heads, kv_heads=kv_heads
        )
        if self.real_blocks and self.grid is not None:
            text = min(self.num_text_tokens, 200)
            grid = TokenGrid(2, min(self.grid.height, 30), min(self.grid.width, 30))
            return replace(small, grid=grid, num_text_tokens=text, tokens=grid.num_tokens + text)
        return replace(small, tokens=min(self.tokens, 7 * BLOCK_SIZE + self.tokens % BLOCK_SIZE))


_SHAPES = (
    KernelShape("wan-1.3b-480p", 12, 12, 32_768, grid=TokenGrid(21, 30, 52)),
    KernelShape("wan-14b-720p", 40, 40, 75_648, grid=TokenGrid(21, 45, 80)),
    KernelShape("hunyuan-720p", 24, 24, 118_784, grid=TokenGrid(33, 45, 80), num_text_tokens=256),
    KernelShape("llm-32k", 32, 8, 32_768, causal=True),
    KernelShape("llm-128k", 32, 8, 131_072, causal=True),
    KernelShape("d64-32k", 24, 24, 32_768, head_dim=64),
    KernelShape("cpu-4k", 4, 4, 4_096, head_dim=64),
)
KERNEL_SHAPES = {shape.name: shape for shape in _SHAPES}


def kernel_shape(name: str) -> KernelShape:
    """The shape of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in KERNEL_SHAPES:
        raise InputError(f"shape is {name!r}; choose from {', '.join(KERNEL_SHAPES)}, or give --heads and --tokens")
    return KERNEL_SHAPES[name]


def random_mask(
    shape: KernelShape, density: float, device: torch.device | str, *, rows: Rows = "even", seed: int = 0
) -> BlockMask:
    """A random mask, another one for every head.

    Args:
        shape: the attention call.
        density: share of a row's blocks that are kept, rounded, at least one; of the visible ones where causal.
            Every query block keeps its own key block, and text is kept whole.
        device: where to make it.
        rows: ``"even"``: every row keeps that share. ``"uneven"``: rows differ as under one threshold for a whole
            head, with the same share in all.
        seed: of the random numbers.

    The lists have room for every block, so that no shape depends on the density.
    """
    if not 0 < density <= 1:
        raise InputError(f"density is {density}; it must be above 0 and at most 1")
    offsets = shape.offsets(device)
    num_blocks = offsets.shape[0] - 1
    num_video_blocks = shape.layout(device).num_video_blocks if shape.real_blocks else num_blocks
    generator = torch.Generator(device=device).manual_seed(seed)
    size = (1, shape.heads, num_video_blocks, num_video_blocks)
    scores = torch.rand(size, generator=generator, device=device)
    if rows == "uneven":
        # the spread of row sizes that thresholds of real draft maps give: some rows keep thrice their share
        scores = scores + 0.35 * torch.randn(*size[:3], 1, generator=generator, device=device)
    visible = torch.ones(size[2:], dtype=torch.bool, device=device)
    if shape.causal:
        visible = visible.tril()
    scores = scores.masked_fill(~visible, -torch.inf)
    scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    if rows == "even":
        kept = (density * visible.sum(-1)).round().clamp(min=1).long()
        ranked = scores.sort(-1, descending=True).values
        lowest = ranked.gather(-1, (kept - 1)[:, None].expand(*size[:3], 1))
    else:
        kept_in_all = max(num_video_blocks, round(density * int(visible.sum())))
        ranked = scores.flatten(-2).sort(-1, descending=True).values
        lowest = ranked[..., kept_in_all - 1][..., None, None]
    chosen = (scores >= lowest) & visible
    text = num_blocks - num_video_blocks
    chosen = torch.nn.functional.pad(chosen, (0, text, 0, text), value=True)
    return BlockMask.from_block_map(chosen, offsets, offsets)


def computed_pairs(mask: BlockMask, heads: int, causal: bool) -> tuple[float, float]:
    """Query-key pairs of a mask that count, and of the dense call, over all heads, in one batch item.

    With ``causal`` the visible ones count: all of a block below the diagonal, about half of one on it.

    >>> offsets = torch.tensor([0, 128, 256], dtype=torch.int32)
    >>> mask = BlockMask.from_block_map(torch.tensor([[[[True, True], [False, True]]]]), offsets, offsets)
    >>> computed_pairs(mask, 1, causal=False), computed_pairs(mask, 1, causal=True)
    ((49152.0, 65536.0), (16512.0, 32896.0))
    """
    lengths = mask.key_offsets.diff().double()
    pairs = lengths[:, None] * lengths
    if causal:
        pairs = pairs.tril(-1) + torch.diag(lengths * (lengths + 1) / 2)
    block_map = mask.block_map[0].double()
    chosen = float((block_map * pairs).sum()) * heads / block_map.shape[0]
    return chosen, float(pairs.sum()) * heads
