"""Tiles of several frames by rule, and where a model forbids them; sparsity by a schedule in a whole run."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from draftattn import InputError, TokenGrid, enable
from draftattn.layout import choose_space_time_tile, choose_tile
from draftattn.schedule import SparsitySchedule

GRID = TokenGrid(3, 5, 7)


def tiles_seen(tiny: ModuleType, model: Any, inputs: Any, **settings: Any) -> list[int]:
    """Lengths of the blocks of the first call."""
    with enable(model, tiny.config(**settings)), tiny.spy_on_kernel() as masks:
        tiny.run(model, inputs)
    lengths: list[int] = masks[0].query_offsets.diff().tolist()
    return lengths


def test_auto_is_space_time_where_frames_may_change_places_and_flat_elsewhere(tiny: ModuleType) -> None:
    model = tiny.wan_transformer()
    free, ordered = tiny.wan_inputs(GRID), tiny.wan_inputs(GRID, per_token_timesteps=True)
    flat, deep = ({"tile": tuple(rule(GRID, tiny.BLOCK_SIZE))} for rule in (choose_tile, choose_space_time_tile))
    assert tiles_seen(tiny, model, free, tile="auto") == tiles_seen(tiny, model, free, **deep)
    assert tiles_seen(tiny, model, ordered, tile="auto") == tiles_seen(tiny, model, ordered, **flat)
    assert tiles_seen(tiny, model, free, tile="frame") == tiles_seen(tiny, model, free, **flat)
    assert tiles_seen(tiny, model, free, tile="auto") != tiles_seen(tiny, model, free, tile="frame")
    with pytest.raises(InputError, match=r"tile is space-time; .* tiles of one frame"):
        tiles_seen(tiny, model, ordered, tile="space-time")


def test_nothing_changes_with_sparsity_0_in_space_time_tiles(tiny: ModuleType) -> None:
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs(GRID)
    dense = tiny.run(model, inputs)
    with enable(model, tiny.config(sparsity=0, tile="space-time")):
        torch.testing.assert_close(tiny.run(model, inputs), dense, rtol=1e-4, atol=1e-5)


def test_a_schedule_sets_the_blocks_kept_in_every_layer_and_step(tiny: ModuleType) -> None:
    pipe = tiny.wan_pipeline()
    schedule = SparsitySchedule((0.5, 1.0), ((0.25, 0.5, 0.75), (0.5, 0.75, 0.9)))
    with enable(pipe, tiny.config(schedule=schedule)), tiny.spy_on_kernel() as masks:
        pipe(
            prompt="a dog", height=16, width=32, num_frames=9, num_inference_steps=2, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
    shares = [1 - mask.kv_num_blocks.float().mean().item() / mask.num_key_blocks for mask in masks]
    expected = [schedule.at(layer, step, 2) for step in range(2) for layer in range(3)]
    assert len(shares) == 6
    for share, mask, sparsity in zip(shares, masks, expected, strict=True):
        assert sparsity - 1 / mask.num_key_blocks < share <= sparsity + 1e-6
