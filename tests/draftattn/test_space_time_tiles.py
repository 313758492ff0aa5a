"""The rule for tiles of several frames, and the names of rules."""

from __future__ import annotations

import math

import pytest

from draftattn import DraftConfig, InputError, TokenGrid, block_layout
from draftattn.layout import choose_space_time_tile, choose_tile, spans_frames

GRIDS = [TokenGrid(21, 30, 52), TokenGrid(9, 16, 28), TokenGrid(33, 45, 80), TokenGrid(2, 5, 7), TokenGrid(7, 1, 90)]


def num_blocks(grid: TokenGrid, tile: tuple[int, int, int]) -> int:
    return math.prod(math.ceil(side / extent) for side, extent in zip(grid, tile, strict=True))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("block_size", [16, 128])
def test_tiles_of_two_to_four_frames_fit_a_block_and_none_such_makes_fewer_blocks(
    grid: TokenGrid, block_size: int
) -> None:
    tile = choose_space_time_tile(grid, block_size)
    assert 2 <= tile.frames <= 4
    assert tile.num_tokens <= block_size
    for frames in range(2, 5):
        for height in range(1, grid.height + 1):
            for width in range(max(1, math.ceil(height / 2)), min(2 * height, grid.width) + 1):
                if frames * height * width <= block_size:
                    assert num_blocks(grid, (frames, height, width)) >= num_blocks(grid, tile)


def test_a_grid_of_one_frame_gets_the_flat_tile() -> None:
    grid = TokenGrid(1, 30, 52)
    assert choose_space_time_tile(grid) == choose_tile(grid)


def test_names_of_rules() -> None:
    grid = TokenGrid(9, 16, 28)
    assert block_layout(grid).tile == block_layout(grid, "frame").tile == choose_tile(grid)
    assert block_layout(grid, "space-time").tile == block_layout(grid, "auto").tile == choose_space_time_tile(grid)
    assert DraftConfig(tile="auto").tile == "auto"
    assert [spans_frames(tile) for tile in ("frame", (1, 8, 16), (2, 8, 8))] == [False, False, True]
    with pytest.raises(InputError, match="one of frame, space-time, auto"):
        block_layout(grid, "cube")  # type: ignore[arg-type]
