"""The block layout: every token exactly once, every block one compact tile."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from draftattn import BlockLayout, InputError, TokenGrid, block_layout
from draftattn.layout import PUBLISHED_TILE, Tile, TileRule, choose_tile, validate_tile

GRIDS = [
    TokenGrid(1, 1, 1),
    TokenGrid(3, 1, 7),
    TokenGrid(5, 7, 3),
    TokenGrid(2, 30, 52),
    TokenGrid(2, 45, 80),
    TokenGrid(2, 52, 30),
    TokenGrid(2, 80, 45),
    TokenGrid(1, 200, 1),
    TokenGrid(3, 48, 80),
]
TILES = ["frame", (1, 8, 16), (1, 5, 3), (2, 4, 4), (3, 5, 7), (1, 128, 1)]


def name_of(sides: tuple[int, ...] | str) -> str:
    return sides if isinstance(sides, str) else "x".join(map(str, sides))


def coordinates_of_blocks(layout: BlockLayout) -> list[torch.Tensor]:
    """The (frame, row, column) of every token, ``[n, 3]`` for each video block."""
    _, height, width = layout.grid
    token = layout.permutation
    coordinates = torch.stack([token // (height * width), token // width % height, token % width], dim=1)
    lengths = layout.offsets.diff()[: layout.num_video_blocks].tolist()
    return list(coordinates.split(lengths))


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
@pytest.mark.parametrize("tile", TILES, ids=name_of)
class TestBlocks:
    def test_permutation_is_a_bijection_and_inverse_undoes_it(
        self, grid: TokenGrid, tile: tuple[int, int, int] | TileRule
    ) -> None:
        layout = block_layout(grid, tile)
        everything = torch.arange(grid.num_tokens)
        assert torch.equal(layout.permutation.sort().values, everything)
        assert torch.equal(layout.permutation[layout.inverse], everything)
        assert torch.equal(layout.inverse[layout.permutation], everything)

    def test_offsets_cover_the_video_in_blocks_of_one_to_block_size_tokens(
        self, grid: TokenGrid, tile: tuple[int, int, int] | TileRule
    ) -> None:
        layout = block_layout(grid, tile)
        lengths = layout.offsets.diff()
        assert layout.offsets.dtype == torch.int32
        assert layout.offsets[0] == 0
        assert layout.offsets[-1] == grid.num_tokens == layout.num_tokens
        assert len(lengths) == layout.num_blocks == layout.num_video_blocks
        assert lengths.min() >= 1
        assert lengths.max() <= layout.tile.num_tokens <= layout.block_size

    def test_every_block_is_one_full_box_no_larger_than_the_tile_in_token_order(
        self, grid: TokenGrid, tile: tuple[int, int, int] | TileRule
    ) -> None:
        layout = block_layout(grid, tile)
        for box, tokens in zip(
            coordinates_of_blocks(layout), layout.permutation.split(layout.offsets.diff().tolist()), strict=True
        ):
            sides = box.amax(0) - box.amin(0) + 1
            assert sides.prod() == len(box), "holes"
            assert (sides <= torch.tensor(layout.tile)).all()
            assert (tokens.diff() > 0).all()

    def test_sides_are_cut_into_the_fewest_nearly_equal_pieces(
        self, grid: TokenGrid, tile: tuple[int, int, int] | TileRule
    ) -> None:
        layout = block_layout(grid, tile)
        boxes = coordinates_of_blocks(layout)
        for axis, (length, limit) in enumerate(zip(grid, layout.tile, strict=True)):
            pieces = {(int(box[:, axis].min()), int(box[:, axis].max()) + 1) for box in boxes}
            extents = [stop - start for start, stop in pieces]
            assert len(pieces) == math.ceil(length / limit)
            assert sum(extents) == length
            assert max(extents) - min(extents) <= 1


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
@pytest.mark.parametrize("tile", ["frame", (1, 8, 16), (1, 5, 3)], ids=name_of)
def test_tiles_of_one_frame_keep_the_frame_order(grid: TokenGrid, tile: tuple[int, int, int] | TileRule) -> None:
    frame_of_place = block_layout(grid, tile).permutation // (grid.height * grid.width)
    assert torch.equal(frame_of_place, torch.arange(grid.frames).repeat_interleave(grid.height * grid.width))


def test_tiles_of_several_frames_mix_frames() -> None:
    frame_of_place = block_layout(TokenGrid(4, 4, 4), (2, 2, 2)).permutation // 16
    assert (frame_of_place.diff() < 0).any()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_to_blocks_gathers_by_permutation_and_from_blocks_restores(dim: int) -> None:
    layout = block_layout(TokenGrid(3, 5, 7), block_size=16)
    x = torch.randn([105 if axis == dim else 2 for axis in range(3)])
    blocked = layout.to_blocks(x, dim)
    assert torch.equal(blocked.movedim(dim, 0), x.movedim(dim, 0)[layout.permutation])
    assert not torch.equal(blocked, x)
    assert torch.equal(layout.from_blocks(blocked, dim), x)


class TestText:
    @pytest.mark.parametrize(
        ("num_text_tokens", "text_blocks"), [(0, []), (1, [1]), (128, [128]), (129, [64, 65]), (256, [128, 128])]
    )
    def test_text_follows_the_video_in_blocks_of_its_own(self, num_text_tokens: int, text_blocks: list[int]) -> None:
        grid = TokenGrid(2, 5, 7)
        video, both = block_layout(grid), block_layout(grid, num_text_tokens=num_text_tokens)
        assert both.num_video_blocks == video.num_blocks
        assert both.num_tokens == grid.num_tokens + num_text_tokens == both.offsets[-1]
        assert both.offsets.diff()[both.num_video_blocks :].tolist() == text_blocks
        assert torch.equal(both.permutation, video.permutation)

    def test_key_offsets_without_lengths_are_the_offsets(self) -> None:
        layout = block_layout(TokenGrid(2, 5, 7), num_text_tokens=40, block_size=16)
        assert layout.key_offsets(None) is layout.offsets

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16], ids=str)
    def test_key_offsets_end_where_each_item_ends(self, dtype: torch.dtype) -> None:
        layout = block_layout(TokenGrid(2, 5, 7), num_text_tokens=40, block_size=16)
        lengths = [0, 1, 14, 33, 40]
        key_offsets = layout.key_offsets(torch.tensor(lengths, dtype=dtype))
        assert key_offsets.dtype == torch.int32
        for offsets, length in zip(key_offsets, lengths, strict=True):
            blocks = offsets.diff()
            assert torch.equal(blocks[: layout.num_video_blocks], layout.offsets.diff()[: layout.num_video_blocks])
            assert blocks[layout.num_video_blocks :].sum() == length
            assert (blocks >= 0).all()
            full = layout.offsets.diff()[layout.num_video_blocks :]
            assert (
                (blocks[layout.num_video_blocks :] == full) | (offsets[layout.num_video_blocks + 1 :] == 70 + length)
            ).all()


def brute_force_tile(grid: TokenGrid, block_size: int) -> tuple[int, int]:
    """The rule of `choose_tile`, by trying every pair of sides: (fewest blocks, smallest sum of sides)."""
    _, height, width = grid
    narrow = min(height, width)
    published = math.ceil(height / math.ceil(height / 8)), math.ceil(width / math.ceil(width / 16))
    costs = []
    for rows, columns in itertools.product(range(1, height + 1), range(1, width + 1)):
        down, across = math.ceil(height / rows), math.ceil(width / columns)
        # the same numbers of pieces are cut by the smallest tile that gives them
        tile = math.ceil(height / down), math.ceil(width / across)
        compact = max(tile) <= 2 * min(tile) or min(tile) == narrow or tile == published
        if tile[0] * tile[1] <= block_size and compact:
            costs.append((down * across, sum(tile)))
    return min(costs)


class TestChooseTile:
    @pytest.mark.parametrize("block_size", [16, 40, 128])
    def test_equals_the_rule_tried_out_on_small_frames(self, block_size: int) -> None:
        for height, width in itertools.product([*range(1, 18), 21, 30], [*range(1, 18), 45]):
            grid = TokenGrid(1, height, width)
            tile = choose_tile(grid, block_size)
            blocks = math.ceil(height / tile.height) * math.ceil(width / tile.width)
            assert (blocks, tile.height + tile.width) == brute_force_tile(grid, block_size), (grid, tile)

    def test_a_tile_of_one_token_is_served(self) -> None:
        assert block_layout(TokenGrid(2, 3, 3), (1, 1, 1)).num_blocks == 18

    def test_is_the_published_tile_wherever_that_divides_the_frame(self) -> None:
        for rows, columns in itertools.product(range(1, 12), range(1, 12)):
            assert choose_tile(TokenGrid(3, 8 * rows, 16 * columns)) == PUBLISHED_TILE

    def test_never_needs_more_blocks_than_the_published_tile_nor_exceeds_a_block(self) -> None:
        for height, width in itertools.product(range(1, 100, 2), range(1, 140, 5)):
            grid = TokenGrid(1, height, width)
            tile = choose_tile(grid)
            assert tile.frames == 1
            assert 1 <= tile.num_tokens <= 128
            published = math.ceil(height / 8) * math.ceil(width / 16)
            assert block_layout(grid).num_blocks <= published, grid

    def test_needs_fewer_blocks_than_the_published_tile_at_480p(self) -> None:
        grid = TokenGrid(1, 30, 52)
        assert choose_tile(grid) == (1, 15, 8)
        assert (block_layout(grid).num_blocks, block_layout(grid, PUBLISHED_TILE).num_blocks) == (14, 16)

    @pytest.mark.parametrize("grid", [TokenGrid(1, 80, 45), TokenGrid(1, 15, 30)], ids=name_of)
    def test_of_equal_tiles_it_is_the_wide_one(self, grid: TokenGrid) -> None:
        assert choose_tile(grid) == (1, 8, 15)

    @pytest.mark.parametrize("grid", GRIDS, ids=name_of)
    def test_is_what_block_layout_takes_by_default(self, grid: TokenGrid) -> None:
        assert block_layout(grid).tile == choose_tile(grid)


class TestCache:
    def test_the_same_request_gives_the_same_object(self) -> None:
        first = block_layout(TokenGrid(2, 9, 11), (1, 3, 4), num_text_tokens=5)
        assert block_layout(TokenGrid(2, 9, 11), (1, 3, 4), num_text_tokens=5) is first
        assert block_layout((2, 9, 11), Tile(1, 3, 4), num_text_tokens=5, device=torch.device("cpu")) is first  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "change", [{"tile": (1, 4, 3)}, {"num_text_tokens": 6}, {"block_size": 64}, {"device": "meta"}], ids=str
    )
    def test_another_request_gives_another(self, change: dict) -> None:
        request = {"tile": (1, 3, 4), "num_text_tokens": 5}
        first = block_layout(TokenGrid(2, 9, 11), **request)
        assert block_layout(TokenGrid(2, 9, 11), **{**request, **change}) is not first


class TestErrors:
    @pytest.mark.parametrize("grid", [(0, 4, 4), (1, -2, 4), (1, 4, 0)], ids=name_of)
    def test_an_empty_grid_is_named(self, grid: tuple[int, int, int]) -> None:
        with pytest.raises(InputError, match=str(grid[1])):
            block_layout(TokenGrid(*grid))

    def test_negative_text_is_refused(self) -> None:
        with pytest.raises(InputError, match="-3 text tokens"):
            block_layout(TokenGrid(1, 4, 4), num_text_tokens=-3)

    @pytest.mark.parametrize("tile", [(8, 16), (1, 8, 16, 1), (1, 0, 16), (1, -8, 16), (1, 8.0, 16), (True, 8, 8), ()])
    def test_a_malformed_tile_is_named(self, tile: tuple) -> None:
        with pytest.raises(InputError, match=r"tile is .*three positive integers"):
            validate_tile(tile, 128)

    def test_a_tile_larger_than_a_block_names_both_sizes(self) -> None:
        with pytest.raises(InputError, match=r"tile 2×8×16 holds 256 tokens; a block holds at most 128"):
            block_layout(TokenGrid(4, 16, 16), (2, 8, 16))
        with pytest.raises(InputError, match="at most 64"):
            block_layout(TokenGrid(4, 16, 16), (1, 8, 16), block_size=64)

    @pytest.mark.parametrize("block_size", [0, -1, 129])
    def test_a_block_size_no_kernel_serves_is_named(self, block_size: int) -> None:
        with pytest.raises(InputError, match=f"block_size is {block_size}"):
            block_layout(TokenGrid(4, 16, 16), block_size=block_size)


def test_a_layout_cached_under_inference_mode_serves_autograd() -> None:
    with torch.inference_mode():
        layout = block_layout(TokenGrid(2, 4, 11), (1, 2, 3))
    x = torch.randn(1, layout.num_tokens, 4, requires_grad=True)
    layout.to_blocks(x, 1).sum().backward()
    assert x.grad is not None
