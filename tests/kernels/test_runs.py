"""Masks of runs of blocks are those of the same runs on a map."""

import pytest
import torch

from draftattn.kernels.block_mask import BlockMask, SlidingWindow
from draftattn.kernels.runs import mask_of_runs

OFFSETS = torch.tensor([0, 16, 31, 31, 47, 60], dtype=torch.int32)


@pytest.mark.parametrize("longest", [3, 99])
@pytest.mark.parametrize("batch", [None, 2])
def test_the_lists_are_those_of_a_map(batch, longest, device):
    generator = torch.Generator().manual_seed(0)
    shape = (5,) if batch is None else (batch, 5)
    first = torch.randint(0, 5, shape, generator=generator)
    count = torch.minimum(torch.randint(-1, 4, shape, generator=generator), 5 - first)
    count[..., 1], count[..., 3] = 0, -1
    column = torch.arange(5)
    block_map = (column >= first[..., None]) & (column < (first + count)[..., None])
    block_map = block_map.reshape(-1, 1, 5, 5).to(device)
    offsets = OFFSETS.to(device)
    key_offsets = offsets if batch is None else torch.stack([offsets, offsets.clamp(max=50)])
    expected = BlockMask.from_block_map(block_map, offsets, key_offsets, 16, longest)
    shifts, window = torch.ones(5, dtype=torch.int32, device=device), SlidingWindow(9, 2)
    numbers = (x.int().to(device) for x in (first, count))
    mask = mask_of_runs(*numbers, longest, offsets, key_offsets, 16, query_shifts=shifts, window=window)
    assert torch.equal(mask.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(mask.kv_indices, expected.kv_indices)
    assert (mask.query_offsets is offsets, mask.key_offsets is key_offsets) == (True, True)
    assert (mask.query_shifts is shifts, mask.window, mask.block_size) == (True, window, 16)


def test_runs_that_are_too_long_are_cut_off(device):
    first, count = torch.tensor([[0], [4]], dtype=torch.int32, device=device)
    offsets = OFFSETS.to(device)
    mask = mask_of_runs(first, count, 2, torch.tensor([0, 16], dtype=torch.int32, device=device), offsets, 16)
    assert mask.kv_indices.tolist() == [[[[0, 1]]]]
    assert mask.kv_num_blocks.tolist() == [[[2]]]
