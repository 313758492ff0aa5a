import re

import pytest
import torch
import torch.nn.functional as F

from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.windows import aligned_to_the_end, sliding_window_mask, visible_blocks

QUERY = torch.tensor([0, 9, 16, 16, 31, 40], dtype=torch.int32)
KEY = torch.tensor([0, 16, 16, 29, 45, 50, 66], dtype=torch.int32)


def tokens_of(offsets):
    """The block of every token."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff().long())


def literal_mask(query_offsets, key_offsets, shifts, starts, size, sink, selected, causal):
    """Token pairs ``[H, S_q, S_k]`` of one item, from the rule in words."""
    query_block, key_block = tokens_of(query_offsets), tokens_of(key_offsets)
    position = (torch.arange(len(query_block)) + shifts[query_block])[:, None]
    start = starts[query_block][:, None]
    j = torch.arange(len(key_block))
    seen = (j > position - size) | (j < start + sink)
    seen = seen & (j >= start)
    seen = seen | selected[:, query_block][:, :, key_block]
    return seen & ((j <= position) | (not causal))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("given", ["nothing", "shifts", "starts", "selected"])
@pytest.mark.parametrize(("size", "sink"), [(1, 0), (14, 0), (20, 17), (500, 3)])
def test_lists_and_tokens(size, sink, given, causal):
    generator = torch.Generator().manual_seed(size)
    selected = torch.rand(2, len(QUERY) - 1, len(KEY) - 1, generator=generator) < 0.3
    shifts = torch.tensor([26, 26, 0, 20, 3], dtype=torch.int32)
    starts = torch.tensor([0, 0, 0, 16, 29], dtype=torch.int32)
    options = {
        "nothing": {},
        "shifts": dict(query_shifts=shifts),
        "starts": dict(starts=starts),
        "selected": dict(selected=selected[None]),
    }[given]
    mask = sliding_window_mask(QUERY, KEY, size, sink=sink, causal=causal, block_size=16, **options)
    expected = literal_mask(
        QUERY,
        KEY,
        shifts if given == "shifts" else torch.full((5,), 26),
        starts if given == "starts" else torch.zeros(5),
        size,
        sink,
        selected if given == "selected" else torch.zeros_like(selected),
        causal,
    )
    # lists hold the blocks in which some query sees some key, and no other
    query_block, key_block = tokens_of(QUERY), tokens_of(KEY)
    seen = torch.zeros(2, len(QUERY) - 1, len(KEY) - 1, dtype=torch.bool)
    for h, i, j in expected.nonzero().tolist():
        seen[h, query_block[i], key_block[j]] = True
    assert torch.equal(mask.block_map[0].expand(2, -1, -1), seen)
    lists = mask.kv_indices.where(torch.arange(mask.kv_indices.shape[-1]) < mask.kv_num_blocks[..., None], 10**6)
    assert (lists.diff(dim=-1) >= 0).all()

    query, key, value = (torch.randn(1, n, 2, 8, generator=generator, dtype=torch.float64) for n in (40, 66, 66))
    out = block_sparse_attention(query, key, value, mask, causal=causal, backend="reference")
    blind = ~expected.any(-1)[None, :, :, None]
    dense = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=expected | blind[0]
    ).masked_fill(blind, 0.0)
    torch.testing.assert_close(out, dense.transpose(1, 2))


def test_items_with_keys_of_their_own():
    """Left padding: the window ends at each item's last key, sinks are its first keys."""
    key_offsets = torch.tensor([[0, 8, 16, 24, 32], [11, 19, 27, 32, 32]], dtype=torch.int32)
    query_offsets = torch.tensor([0, 2], dtype=torch.int32)
    mask = sliding_window_mask(query_offsets, key_offsets, 6, sink=2, block_size=8)
    assert mask.query_shifts.tolist() == [[30], [30]]
    assert mask.block_map[:, 0, 0].int().tolist() == [[1, 0, 0, 1], [1, 1, 1, 0]]
    query, key = torch.randn(2, 2, 1, 16), torch.randn(2, 32, 1, 16)
    out = block_sparse_attention(query, key, key, mask, causal=True, backend="reference")
    seen = torch.zeros(2, 2, 32, dtype=torch.bool)
    for item, start in enumerate((0, 11)):
        for i in range(2):
            seen[item, i, start : start + 2] = True
            seen[item, i, 30 + i - 5 : 30 + i + 1] = True
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, key)), attn_mask=seen[:, None])
    torch.testing.assert_close(out, dense.transpose(1, 2))


def test_selected_blocks_are_whole_and_lists_as_short_as_asked():
    selected = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    selected[..., 5, 1] = selected[..., 1, 4] = True  # the second is in the future
    offsets = torch.arange(7, dtype=torch.int32) * 8
    mask = sliding_window_mask(offsets, offsets, 3, selected=selected, block_size=8, max_blocks_per_row=3)
    assert mask.kv_indices.shape[-1] == 3
    assert mask.kv_indices[0, 0, 5].tolist() == [1, 4, 5]
    assert mask.window.whole[0, 0, 5].tolist() == [True, False, False]
    assert mask.kv_num_blocks[0, 0].tolist() == [1, 2, 2, 2, 2, 3]
    assert mask.whole_map.sum() == 1


def test_without_a_window_all_of_the_past_is_seen():
    shifts = aligned_to_the_end(QUERY, KEY)
    seen = visible_blocks(QUERY, KEY, shifts, causal=True)
    assert seen[0, 0].int().tolist() == [[1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0], [0] * 6] + [[1, 0, 1, 1, 1, 1]] * 2


def test_refusals():
    with pytest.raises(ValueError, match="window has size 0 and sink 0"):
        sliding_window_mask(QUERY, KEY, 0)
    message = "selected must be bool [B, H, 5, 6]; got torch.bool [1, 2, 6, 5]"
    with pytest.raises(ValueError, match=re.escape(message)):
        sliding_window_mask(QUERY, KEY, 4, selected=torch.ones(1, 2, 6, 5, dtype=torch.bool))
