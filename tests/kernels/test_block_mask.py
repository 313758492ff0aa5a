from itertools import pairwise

import pytest
import torch

from draftattn.kernels.block_mask import BlockMask

OFFSETS = torch.tensor([0, 5, 5, 12, 15], dtype=torch.int32)


def random_map(*shape, density=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) < density


def test_lists_are_ascending_left_packed_and_complete():
    block_map = random_map(2, 3, 4, 4)
    block_map[0, 0, 0] = False
    mask = BlockMask.from_block_map(block_map, OFFSETS, OFFSETS, 8)
    assert mask.kv_num_blocks.dtype == mask.kv_indices.dtype == torch.int32
    for row, count, ids in zip(
        block_map.view(-1, 4), mask.kv_num_blocks.flatten(), mask.kv_indices.view(-1, 4), strict=True
    ):
        assert ids[:count].tolist() == row.nonzero().flatten().tolist()
        assert bool(((ids >= 0) & (ids < 4)).all())


def test_map_survives_the_lists_whatever_the_unused_entries_hold():
    block_map = random_map(1, 2, 4, 4)
    mask = BlockMask.from_block_map(block_map, OFFSETS, OFFSETS, 8)
    unused = torch.arange(4) >= mask.kv_num_blocks[..., None]
    rebuilt = BlockMask(mask.kv_num_blocks, mask.kv_indices.masked_fill(unused, 3), OFFSETS, OFFSETS, 8)
    assert torch.equal(rebuilt.block_map, block_map)


def test_bounded_lists_are_short_and_keep_the_first_blocks():
    block_map = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    block_map[..., 0, 1:] = False
    mask = BlockMask.from_block_map(block_map, OFFSETS, OFFSETS, 8, max_blocks_per_row=2)
    assert mask.kv_indices.shape[-1] == 2
    assert mask.kv_num_blocks.flatten().tolist() == [1, 2, 2, 2]
    assert mask.block_map[0, 0, 3].tolist() == [True, True, False, False]


def test_dense_mask_and_density_count_the_same_scores():
    key_offsets = torch.tensor([0, 3, 10, 10, 17, 20], dtype=torch.int32)
    mask = BlockMask.from_block_map(random_map(2, 3, 4, 5), OFFSETS, key_offsets, 8)
    dense = torch.stack([mask.to_dense(i) for i in range(2)])
    assert dense.shape == (2, 3, 15, 20)
    for i, (q0, q1) in enumerate(pairwise(OFFSETS.tolist())):
        for j, (k0, k1) in enumerate(pairwise(key_offsets.tolist())):
            assert bool((dense[:, :, q0:q1, k0:k1] == mask.block_map[:, :, i, j, None, None]).all())
    assert mask.density.item() == pytest.approx(dense.float().mean().item())


def test_density_of_a_shared_map_with_key_offsets_per_item():
    key_offsets = torch.tensor([[0, 4, 8], [0, 2, 8]], dtype=torch.int32)
    block_map = torch.tensor([[True, False]]).expand(1, 1, 4, 2)
    mask = BlockMask.from_block_map(block_map, OFFSETS, key_offsets, 8)
    assert mask.density.item() == pytest.approx((4 / 8 + 2 / 8) / 2)


@pytest.mark.parametrize("length", [192, 150], ids=["whole", "last-block-ragged"])
def test_flex_round_trip(length):
    offsets = torch.tensor([0, 64, 128, length], dtype=torch.int32)
    mask = BlockMask.from_block_map(random_map(1, 2, 3, 3), offsets, offsets, 64)
    back = BlockMask.from_flex(mask.to_flex())
    assert torch.equal(back.block_map, mask.block_map)
    assert torch.equal(back.query_offsets, offsets)
    assert back.block_size == 64


def test_flex_refuses_what_it_cannot_hold():
    mask = BlockMask.from_block_map(random_map(1, 1, 4, 4), OFFSETS, OFFSETS, 8)
    with pytest.raises(ValueError, match="query blocks of 8 tokens; some blocks are ragged"):
        mask.to_flex()
    per_item = BlockMask.from_block_map(random_map(1, 1, 4, 4), OFFSETS, OFFSETS[None], 8)
    with pytest.raises(ValueError, match="per batch item"):
        per_item.to_flex()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(block_size=129), "block_size is 129"),
        (dict(block_size=0), "block_size is 0"),
        (dict(kv_num_blocks=torch.zeros(1, 1, 3, dtype=torch.int32)), "kv_num_blocks must be"),
        (dict(query_offsets=OFFSETS[:-1]), "query_offsets must hold 5 boundaries for 4 query blocks"),
        (dict(key_offsets=OFFSETS[None, None]), "key_offsets must be"),
        (dict(key_offsets=OFFSETS.long()), "key_offsets must be int32"),
        (dict(key_offsets=OFFSETS.to("meta")), "key_offsets is on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(changes, message):
    fields = dict(
        kv_num_blocks=torch.zeros(1, 1, 4, dtype=torch.int32),
        kv_indices=torch.zeros(1, 1, 4, 4, dtype=torch.int32),
        query_offsets=OFFSETS,
        key_offsets=OFFSETS,
    )
    with pytest.raises(ValueError, match=message):
        BlockMask(**(fields | changes))


def test_map_refusals():
    with pytest.raises(ValueError, match="block_map must be bool"):
        BlockMask.from_block_map(torch.ones(1, 1, 4, 4), OFFSETS, OFFSETS)
    with pytest.raises(ValueError, match="block_map has 3 key blocks and key_offsets describes 4"):
        BlockMask.from_block_map(torch.ones(1, 1, 4, 3, dtype=torch.bool), OFFSETS, OFFSETS)
