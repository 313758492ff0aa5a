"""Policies of fixed patterns against their rules written out tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from draftattn import BlockLayout, DraftConfig, TokenGrid, block_layout
from draftattn.inputs import AttentionInputs
from draftattn.policies.carve import CarveConfig, touching
from draftattn.policies.radial import RadialConfig
from draftattn.policies.sliding_tile import SlidingTileConfig, window_masks
from draftattn.policies.svg import SvgConfig, two_masks
from draftattn.policy import CallContext

Call = Callable[..., AttentionInputs]
Tile = tuple[int, int, int]

LAYOUTS = [
    block_layout(TokenGrid(4, 7, 9), (1, 4, 5), block_size=20),
    block_layout(TokenGrid(9, 10, 13), (2, 3, 3), block_size=20),
    block_layout(TokenGrid(11, 4, 4), (1, 4, 4), block_size=20),
]


def tiles_of(layout: BlockLayout) -> list[Tile]:
    """Every block's place, found from the tokens it holds."""
    _, height, width = layout.grid
    starts: list[set[int]] = [set(), set(), set()]
    corners = []
    for first in layout.offsets[:-1].tolist():
        token = int(layout.permutation[first])
        corner = token // (height * width), token // width % height, token % width
        corners.append(corner)
        for side, value in zip(starts, corner, strict=True):
            side.add(value)
    order = [sorted(side) for side in starts]
    return [tuple(order[i].index(corner[i]) for i in range(3)) for corner in corners]  # type: ignore[misc]


def extent(tiles: list[Tile]) -> Tile:
    return tuple(max(tile[i] for tile in tiles) + 1 for i in range(3))  # type: ignore[return-value]


def pairs(tiles: list[Tile], rule: Callable[[Tile, Tile], bool]) -> Tensor:
    return torch.tensor([[rule(a, b) for b in tiles] for a in tiles])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(tuple(layout.grid)))
class TestTiles:
    def test_touching_tiles_differ_by_at_most_one_on_each_side(self, layout: BlockLayout) -> None:
        tiles = tiles_of(layout)
        expected = pairs(tiles, lambda a, b: all(abs(x - y) <= 1 for x, y in zip(a, b, strict=True)))
        assert torch.equal(touching(layout), expected)

    @pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 2), (2, 2, 2), (99, 1, 99)], ids=str)
    def test_a_window_slides_and_stops_at_the_borders(self, layout: BlockLayout, window: Tile) -> None:
        tiles = tiles_of(layout)
        sides = extent(tiles)

        def rule(a: Tile, b: Tile) -> bool:
            for place, other, size, side in zip(a, b, window, sides, strict=True):
                size = min(size, side)
                first = place - size // 2
                while first < 0:
                    first += 1
                while first + size > side:
                    first -= 1
                if not first <= other < first + size:
                    return False
            return True

        made = window_masks(layout, (window,)).maps[0]
        assert torch.equal(made, pairs(tiles, rule))
        assert (made.sum(-1) == math.prod(min(x) for x in zip(window, sides, strict=True))).all()

    @pytest.mark.parametrize("decay", [0.1, 0.5, 1.0, 3.0])
    @pytest.mark.parametrize("first_frame", [False, True])
    def test_radial_is_its_equation(self, layout: BlockLayout, decay: float, first_frame: bool) -> None:
        tiles = tiles_of(layout)
        _, height, width = extent(tiles)

        def rule(a: Tile, b: Tile) -> bool:
            if first_frame and b[0] == 0:
                return True
            distance, space = abs(a[0] - b[0]), abs((a[1] - b[1]) * width + a[2] - b[2])
            level = 0
            while 2 ** (level + 1) <= max(distance, 1):
                level += 1
            window = decay * height * width / 2**level
            if space + 1 <= window:
                return True
            return space == 0 and distance % math.ceil(1 / window) == 0

        policy = RadialConfig(decay, first_frame).make(DraftConfig())
        inputs = AttentionInputs(*torch.randn(3, 1, layout.num_tokens, 1, 8), layout)
        assert torch.equal(policy(inputs, CallContext()).block_map[0, 0], pairs(tiles, rule))

    @pytest.mark.parametrize("sparsity", [0.3, 0.6])
    def test_radial_takes_the_widest_windows_within_the_budget(self, layout: BlockLayout, sparsity: float) -> None:
        inputs = AttentionInputs(*torch.randn(3, 1, layout.num_tokens, 1, 8), layout)
        budget = math.ceil((1 - sparsity) * layout.num_blocks) * layout.num_blocks
        kept = RadialConfig().make(DraftConfig(sparsity=sparsity))(inputs, CallContext()).block_map.sum()
        assert kept <= budget
        fitting = [
            count
            for decay in (2.0 ** (i / 4) for i in range(-25, 25))
            if (count := RadialConfig(decay).make(DraftConfig())(inputs, CallContext()).block_map.sum()) <= budget
        ]
        assert kept >= 0.95 * max(fitting)

    @pytest.mark.parametrize("first_frame", [False, True])
    @pytest.mark.parametrize("kept", [4, 7])
    def test_svg_masks_are_bands_frame_by_frame_and_place_by_place(
        self, layout: BlockLayout, first_frame: bool, kept: int
    ) -> None:
        tiles = tiles_of(layout)
        frames, height, width = extent(tiles)
        masks = two_masks(layout, kept, first_frame)
        orders = {
            "spatial": lambda tile: (tile[0] * height + tile[1]) * width + tile[2],
            "temporal": lambda tile: (tile[1] * width + tile[2]) * frames + tile[0],
        }
        sink = pairs(tiles, lambda a, b: first_frame and b[0] == 0)
        for made, order in zip(masks.maps, orders.values(), strict=True):
            places = torch.tensor([order(tile) for tile in tiles])
            distance = (places[:, None] - places).abs()
            bands = [(distance <= width) | sink for width in range(len(tiles) + 1)]
            fitting = [band for band in bands if band.sum() <= kept * len(tiles)] or bands[:1]
            assert torch.equal(made.cpu(), fitting[-1])


def output_of(call: AttentionInputs, block_map: Tensor, row: int, item: int, head: int) -> Tensor:
    """Attention of one video query over the kept video blocks and the valid text, written out in float64."""
    layout = call.layout
    group = call.query.shape[2] // call.key.shape[2]
    edges = layout.offsets.tolist()
    block = next(i for i in range(len(edges) - 1) if edges[i] <= row < edges[i + 1])
    keys = [j for b in range(layout.num_video_blocks) if block_map[block, b] for j in range(edges[b], edges[b + 1])]
    video = layout.grid.num_tokens
    valid = layout.num_text_tokens if call.text_lengths is None else int(call.text_lengths[item])
    keys += range(video, video + valid)
    query = call.query[item, row, head].double()
    scores = call.key[item, keys, head // group].double() @ query / query.shape[0] ** 0.5
    return scores.softmax(0) @ call.value[item, keys, head // group].double()


def errors_of(call: AttentionInputs, maps: list[Tensor], rows: list[int]) -> Tensor:
    """Mean squared errors ``[B, H, C]``, written out."""
    batch, _, heads, _ = call.query.shape
    everything = torch.ones_like(maps[0])
    out = torch.zeros(batch, heads, len(maps), dtype=torch.float64)
    for item, head, (c, block_map) in product(range(batch), range(heads), enumerate(maps)):
        differences = [
            output_of(call, block_map, row, item, head) - output_of(call, everything, row, item, head) for row in rows
        ]
        out[item, head, c] = torch.stack(differences).square().mean()
    return out


@pytest.mark.parametrize("text", [0, 23])
def test_heads_are_profiled_by_the_error_of_sampled_queries(
    call: Call, monkeypatch: pytest.MonkeyPatch, text: int
) -> None:
    from draftattn.policies import profiling

    inputs = call(text=text, batch=2, lengths=[23, 5] if text else None)
    maps = two_masks(inputs.layout, 4).maps
    rows = torch.tensor([0, 17, 100, 251], device=inputs.query.device)
    expected = errors_of(inputs, list(maps), rows.tolist()).float()
    for chunk in (profiling._CHUNK_ELEMENTS, 1):  # the last is head by head
        monkeypatch.setattr(profiling, "_CHUNK_ELEMENTS", chunk)
        torch.testing.assert_close(profiling.candidate_errors(inputs, maps, rows).cpu(), expected)


def in_space_or_time(call: Call, temporal_heads: list[bool]) -> AttentionInputs:
    """Keys and queries of each head agree within a frame, or within a place of all frames."""
    inputs = call(TokenGrid(6, 8, 10), heads=len(temporal_heads), kv_heads=len(temporal_heads))
    tiles = tiles_of(inputs.layout)
    lengths = inputs.layout.offsets.diff().long().cpu()
    names = torch.randn(2, 99, 16, generator=torch.Generator().manual_seed(1))
    for head, temporal in enumerate(temporal_heads):
        ids = torch.tensor([tile[1] * 10 + tile[2] if temporal else tile[0] for tile in tiles])
        direction = names[int(temporal)][ids].repeat_interleave(lengths, 0).to(inputs.query)
        inputs.query[0, :, head] = 3 * direction
        inputs.key[0, :, head] = 3 * direction
    return inputs


class TestSvg:
    def test_each_head_takes_the_mask_it_needs(self, call: Call) -> None:
        wanted = [True, False, False, True]
        inputs = in_space_or_time(call, wanted)
        made = SvgConfig(first_frame=False).make(DraftConfig(sparsity=0.75))(inputs, CallContext()).block_map[0]
        spatial, temporal = two_masks(inputs.layout, 6, False).maps
        assert not torch.equal(spatial, temporal)
        for head, is_temporal in enumerate(wanted):
            assert torch.equal(made[head], temporal if is_temporal else spatial)


class TestSlidingTile:
    def test_each_head_takes_the_window_it_needs_and_keeps_it(self, call: Call) -> None:
        policy = SlidingTileConfig().make(DraftConfig(sparsity=5 / 6, growth=0))
        run = object()

        def mask(inputs: AttentionInputs, **place: Any) -> Tensor:
            return policy(inputs, CallContext(**{"layer": 0, "num_steps": 5, "run": run, **place})).block_map[0]

        inputs, opposite = in_space_or_time(call, [True, False]), in_space_or_time(call, [False, True])
        first = mask(inputs, step=2)
        in_time, in_space = (window_masks(inputs.layout, (window,)).maps[0] for window in ((4, 1, 1), (1, 2, 2)))
        assert torch.equal(first[0], in_time)
        assert torch.equal(first[1], in_space)
        assert torch.equal(mask(opposite, step=3), first)
        assert not torch.equal(mask(opposite, step=3, layer=1), first)
        assert not torch.equal(mask(opposite, step=3, run=object()), first)

    def test_a_given_window_serves_all(self, call: Call) -> None:
        inputs = call()
        made = SlidingTileConfig((2, 1, 2)).make(DraftConfig())(inputs, CallContext()).block_map
        assert torch.equal(made[0, 0], window_masks(inputs.layout, ((2, 1, 2),)).maps[0])


class TestCarve:
    @pytest.mark.parametrize("sparsity", [0.5, 0.9])
    @pytest.mark.parametrize("mass", [0.0, 0.3, 0.8])
    @pytest.mark.parametrize("neighbours", [False, True])
    def test_a_row_keeps_the_union_of_three_sets(
        self, call: Call, sparsity: float, mass: float, neighbours: bool
    ) -> None:
        inputs = call(batch=2)
        layout = inputs.layout
        made = CarveConfig(mass, neighbours).make(DraftConfig(sparsity=sparsity))(inputs, CallContext()).block_map
        edges = layout.offsets.tolist()
        tiles = tiles_of(layout)
        budget = math.ceil((1 - sparsity) * layout.num_blocks - 1e-9)
        for item, head, row in product(range(2), range(4), range(layout.num_blocks)):
            query = inputs.query[item, edges[row] : edges[row + 1], head].double().mean(0)
            weights = []
            for column in range(layout.num_blocks):
                part = slice(edges[column], edges[column + 1])
                key = inputs.key[item, part, head // 2].double().mean(0)
                weights.append(math.exp(query @ key / 4) * (part.stop - part.start))
            best = sorted(range(layout.num_blocks), key=lambda b: -weights[b])
            expected, total = set(best[:budget]), 0.0
            for column in best:
                expected.add(column)
                total += weights[column] / sum(weights)
                if total >= mass:
                    break
            if neighbours:
                expected |= {
                    column
                    for column in range(layout.num_blocks)
                    if all(abs(x - y) <= 1 for x, y in zip(tiles[row], tiles[column], strict=True))
                }
            assert set(made[item, head, row].nonzero().flatten().tolist()) == expected
