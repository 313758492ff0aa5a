"""Block layout: the token order in which every kernel block is a compact tile of the video."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from draftattn.errors import InputError

PUBLISHED_TILE = (1, 8, 16)
MAX_BLOCK_SIZE = 128
_LONGEST_IN_TIME = 4  # frames of a space-time tile

TileRule = Literal["frame", "space-time", "auto"]


class TokenGrid(NamedTuple):
    """Frames, height and width of a video in tokens, after patchify.

    >>> TokenGrid(21, 30, 52).num_tokens
    32760
    """

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole video."""
        return self.frames * self.height * self.width


class Tile(NamedTuple):
    """Largest extent of a block in frames, rows and columns of the token grid."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a full tile."""
        return self.frames * self.height * self.width


def validate_tile(tile: tuple[int, int, int], block_size: int) -> Tile:
    """Checks a user's tile against the block size.

    Raises:
        InputError: unless the tile is three positive integers whose product is at most ``block_size``.
    """
    if (
        not isinstance(tile, (tuple, list))
        or len(tile) != 3
        or not all(type(side) is int and side >= 1 for side in tile)
    ):
        raise InputError(f"tile is {tile!r}; it must be three positive integers (frames, height, width)")
    checked = Tile(*tile)
    if checked.num_tokens > block_size:
        raise InputError(
            f"tile {_times(checked)} holds {checked.num_tokens} tokens; a block holds at most {block_size}"
        )
    return checked


def validate_rule(tile: str) -> TileRule:
    """Checks the name of a rule that chooses tiles.

    Raises:
        InputError: if there is none of that name.
    """
    if tile not in get_args(TileRule):
        names = ", ".join(get_args(TileRule))
        raise InputError(f"tile is {tile!r}; give three positive integers (frames, height, width), or one of {names}")
    return tile  # type: ignore[return-value]


@lru_cache(maxsize=256)
def choose_tile(grid: TokenGrid, block_size: int = MAX_BLOCK_SIZE) -> Tile:
    """The within-frame tile that covers a grid with the fewest blocks.

    A kernel spends the time of a whole block on a ragged one, so the work at a given density falls with the square
    of the number of blocks. The published 8×16 covers a 30×52 frame (480p) with 16 blocks that are 76 % full; 15×8
    does it with 14 that are 87 % full. The rule: of all ways to cut a frame into equal rows and columns of tiles of
    at most ``block_size`` tokens, whose longer side is at most twice the shorter (no more elongated than the
    published tile), and the cut that the published tile itself makes, take the one with the fewest blocks; of equals
    the most compact, then the published orientation. Where 8×16 divides the frame it is always chosen, and nowhere
    are there more blocks than with 8×16.

    >>> choose_tile(TokenGrid(33, 48, 80)), choose_tile(TokenGrid(21, 30, 52))
    (Tile(frames=1, height=8, width=16), Tile(frames=1, height=15, width=8))
    """
    _, height, width = grid
    published = _even(height, PUBLISHED_TILE[1]), _even(width, PUBLISHED_TILE[2])
    best: tuple[tuple[int, int, bool], Tile] | None = None
    for height_pieces in range(1, height + 1):
        tile_height = math.ceil(height / height_pieces)
        for width_pieces in range(math.ceil(width * tile_height / block_size), width + 1):
            tile_width = math.ceil(width / width_pieces)
            # A frame narrower than any compact tile leaves no choice but an elongated one.
            elongated = max(tile_height, tile_width) > 2 * min(tile_height, tile_width)
            unavoidable = min(height, width) == min(tile_height, tile_width) or (tile_height, tile_width) == published
            if tile_height * tile_width > block_size or (elongated and not unavoidable):
                continue
            cost = (height_pieces * width_pieces, tile_height + tile_width, tile_height > tile_width)
            if best is None or cost < best[0]:
                best = cost, Tile(1, tile_height, tile_width)
            break
    assert best is not None  # one token per tile always fits
    return best[1]


@lru_cache(maxsize=256)
def choose_space_time_tile(grid: TokenGrid, block_size: int = MAX_BLOCK_SIZE) -> Tile:
    """The tile of two to four frames that covers a grid with the fewest blocks.

    Neighbouring frames resemble each other more than distant parts of one frame do, so the tokens of a compact
    space-time tile have more alike queries, keys and values than those of a flat one of as many tokens: the draft is
    more precise and the means of skipped blocks lose less. The rule: of all ways to cut frames, rows and columns into
    equal pieces of 2 to 4 frames and an area whose longer side is at most twice the shorter, take the one with the
    fewest blocks; of equals the most compact. A grid of one frame gets the tile of `choose_tile`.

    >>> choose_space_time_tile(TokenGrid(21, 30, 52)), choose_space_time_tile(TokenGrid(9, 16, 28))
    (Tile(frames=3, height=6, width=7), Tile(frames=3, height=6, width=7))
    """
    best: tuple[tuple[int, int], Tile] | None = None
    for frames in range(2, min(grid.frames, _LONGEST_IN_TIME) + 1):
        if _even(grid.frames, frames) != frames:
            continue
        area = choose_tile(TokenGrid(1, grid.height, grid.width), block_size // frames)
        tile = Tile(frames, area.height, area.width)
        num_blocks = math.prod(math.ceil(side / extent) for side, extent in zip(grid, tile, strict=True))
        cost = num_blocks, sum(tile)
        if best is None or cost < best[0]:
            best = cost, tile
    return choose_tile(grid, block_size) if best is None else best[1]


def spans_frames(tile: tuple[int, int, int] | TileRule) -> bool:
    """Whether tiles hold tokens of several frames, so that the order of frames is not kept.

    >>> spans_frames((2, 8, 8)), spans_frames("space-time"), spans_frames("frame"), spans_frames("auto")
    (True, True, False, False)
    """
    return tile == "space-time" if isinstance(tile, str) else tile[0] > 1


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """A permutation of the video tokens under which every block is a space-time tile.

    Blocks follow each other by frames, then rows, then columns; inside a block tokens keep their order. With tiles
    of one frame the order of frames is kept. A side that the tile does not divide is cut into the same number of
    pieces of nearly equal length, so no block is a sliver and no padding token exists. Text tokens, if any, follow
    the video in blocks of their own.

    Args:
        grid: the token grid.
        tile: largest extent of a block.
        block_size: the most tokens a block holds.
        num_text_tokens: tokens after the video.
        permutation: int64 ``[grid.num_tokens]``: the token that stands at each place of the blocked order.
        inverse: int64 ``[grid.num_tokens]``: the place of each token in the blocked order.
        offsets: int32 ``[num_blocks + 1]``: block boundaries, text blocks included.
        num_video_blocks: blocks of video; the rest are text.
        video_block_sizes: float32 ``[num_video_blocks]``: tokens of each video block.
        log_video_block_sizes: their logarithms: what a key block's score gains by its size.

    Build it with `block_layout`, which caches.
    """

    grid: TokenGrid
    tile: Tile
    block_size: int
    num_text_tokens: int
    permutation: Tensor
    inverse: Tensor
    offsets: Tensor
    num_video_blocks: int
    video_block_sizes: Tensor
    log_video_block_sizes: Tensor

    @property
    def num_blocks(self) -> int:
        """Blocks of video and text."""
        return self.offsets.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of video and text."""
        return self.grid.num_tokens + self.num_text_tokens

    def to_blocks(self, x: Tensor, dim: int) -> Tensor:
        """Reorders the video tokens along ``dim`` into blocks. ``x`` holds video tokens only along it."""
        return x.index_select(dim, self.permutation.to(x.device))

    def from_blocks(self, x: Tensor, dim: int) -> Tensor:
        """Undoes `to_blocks`."""
        return x.index_select(dim, self.inverse.to(x.device))

    def key_offsets(self, text_lengths: Tensor | None) -> Tensor:
        """Block boundaries where each batch item has its own number of valid text tokens.

        Args:
            text_lengths: ``[B]``, valid text tokens of each item (the leading ones), or None where all are valid.

        Returns:
            ``offsets`` ``[num_blocks + 1]``, or int32 ``[B, num_blocks + 1]``: text past an item's length is in no
            block, so no kernel reads it.
        """
        if text_lengths is None:
            return self.offsets
        ends = self.grid.num_tokens + text_lengths.to(self.offsets)
        return torch.minimum(self.offsets[None], ends[:, None]).contiguous()


def block_layout(
    grid: TokenGrid,
    tile: tuple[int, int, int] | TileRule = "frame",
    *,
    block_size: int = MAX_BLOCK_SIZE,
    num_text_tokens: int = 0,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The block layout of a token grid, from a cache.

    Args:
        grid: ``(frames, height, width)`` in tokens.
        tile: largest extent of a block, or a rule: ``"frame"`` for `choose_tile`, ``"space-time"`` and
            ``"auto"`` for `choose_space_time_tile`. A side longer than the grid's is cut to it.
        block_size: the most tokens a block holds, at most 128.
        num_text_tokens: text tokens that follow the video.
        device: where the index tensors live.

    Raises:
        InputError: if the grid is empty, the tile does not fit into a block, or the block size is out of range.

    >>> layout = block_layout(TokenGrid(2, 3, 5), (1, 2, 4))
    >>> layout.offsets.diff().tolist()
    [2, 3, 4, 6, 2, 3, 4, 6]
    """
    if min(grid) < 1 or num_text_tokens < 0:
        raise InputError(f"token grid {tuple(grid)} with {num_text_tokens} text tokens; every side must be positive")
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise InputError(f"block_size is {block_size!r}; a block holds 1 to {MAX_BLOCK_SIZE} tokens")
    grid = TokenGrid(*grid)
    if isinstance(tile, str):
        rule = choose_tile if validate_rule(tile) == "frame" else choose_space_time_tile
        chosen = rule(grid, block_size)
    else:
        chosen = validate_tile(tile, block_size)
    return _build_layout(grid, chosen, block_size, num_text_tokens, torch.device(device))


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def _build_layout(
    grid: TokenGrid, tile: Tile, block_size: int, num_text_tokens: int, device: torch.device
) -> BlockLayout:
    tokens = torch.arange(grid.num_tokens, device="cpu").view(grid)
    order: list[Tensor] = []
    lengths: list[int] = []
    for frames in _pieces(grid.frames, tile.frames):
        for rows in _pieces(grid.height, tile.height):
            for columns in _pieces(grid.width, tile.width):
                block = tokens[frames, rows, columns].flatten()
                order.append(block)
                lengths.append(block.numel())
    num_video_blocks = len(lengths)
    lengths += [piece.stop - piece.start for piece in _pieces(num_text_tokens, block_size)]
    permutation = torch.cat(order)
    offsets = torch.tensor([0, *lengths], device="cpu").cumsum(0)
    sizes = torch.tensor(lengths[:num_video_blocks], device="cpu", dtype=torch.float32)
    return BlockLayout(
        grid=grid,
        tile=tile,
        block_size=block_size,
        num_text_tokens=num_text_tokens,
        permutation=permutation.to(device),
        inverse=permutation.argsort().to(device),
        offsets=offsets.to(device, torch.int32),
        num_video_blocks=num_video_blocks,
        video_block_sizes=sizes.to(device),
        log_video_block_sizes=sizes.log().to(device),
    )


def _pieces(length: int, limit: int) -> Iterator[slice]:
    """Cuts ``length`` into the fewest pieces of at most ``limit``, as equal as can be."""
    count = math.ceil(length / limit)
    for i in range(count):
        yield slice(i * length // count, (i + 1) * length // count)


def _even(length: int, limit: int) -> int:
    """The longest of the nearly equal pieces that `_pieces` cuts."""
    return math.ceil(length / math.ceil(length / limit))


def _times(sides: tuple[int, ...]) -> str:
    return "×".join(map(str, sides))
