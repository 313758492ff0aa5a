"""Reading attention masks, and counting what masks compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from draftattn.kernels.block_mask import BlockMask
from draftattn.pipelines.llm.dense import dense_attention
from draftattn.pipelines.llm.density import DensityRecorder, causal_pairs, computed_pairs
from draftattn.pipelines.llm.inputs import CausalInputs, even_offsets
from draftattn.pipelines.llm.ranges import TokenRanges


def test_a_mask_is_read_as_ranges() -> None:
    rows = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]]
    ranges = TokenRanges.of(6, 3, 5, torch.tensor(rows))
    assert ranges.ranges == ((2, 5), (0, 5), (0, 2), (0, 0), (2, 5), (1, 4))
    assert ranges.gaps == 5
    assert ranges.query_offset == 2
    assert [group.items for group in ranges.groups()] == [(0, 4), (1,), (2,), (5,)]
    whole = TokenRanges.of(2, 4, 4, torch.ones(2, 9))
    assert whole.padding is None
    assert whole.groups() == [(None, 0, 4)]
    # what a mask does not reach is not attended to
    assert TokenRanges.of(1, 4, 4, torch.ones(1, 3)).ranges == ((0, 3),)
    assert TokenRanges.of(2, 4, 4, torch.tensor([[0, 1, 1, 1]] * 2)).groups() == [(None, 1, 4)]


@pytest.mark.parametrize(("num_queries", "num_keys"), [(70, 70), (23, 70), (1, 41)])
def test_pairs_are_those_of_the_tokens(num_queries: int, num_keys: int) -> None:
    query, key = torch.zeros(1, num_queries, 2, 8), torch.zeros(1, num_keys, 1, 8)
    inputs = CausalInputs(query, key, key, block_size=16)
    shape = 2, 2, inputs.query_offsets.shape[0] - 1, inputs.key_offsets.shape[0] - 1
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = inputs.block_mask(chosen)
    position = torch.arange(num_keys - num_queries, num_keys)[:, None]
    seen = torch.arange(num_keys) <= position
    counts = [(mask.to_dense(item) & seen).sum((-1, -2)).double().mean() for item in (0, 1)]
    assert computed_pairs(mask, num_queries, num_keys) == sum(counts) / 2
    assert causal_pairs(num_queries, num_keys) == seen.sum()
    recorder = DensityRecorder()
    assert recorder.density() is None
    recorder.record(3, mask, num_queries, num_keys, batch=2)
    recorder.record_dense(4, num_queries, num_keys, batch=2)
    assert recorder.by_layer()[4] == 1
    assert recorder.density() == pytest.approx((recorder.by_layer()[3] + 1) / 2)
    recorder.reset()
    assert recorder.by_layer() == {}


def test_pairs_honour_shifts_and_offsets_per_item() -> None:
    offsets = torch.tensor([[0, 4, 8], [2, 6, 8]], dtype=torch.int32)
    everything = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    shifts = torch.tensor([0, 2], dtype=torch.int32)
    mask = BlockMask.from_block_map(everything, torch.tensor([0, 3, 6]).int(), offsets, query_shifts=shifts)
    # queries at 0, 1, 2, 5, 6, 7; the second item's keys begin at 2
    assert computed_pairs(mask, 6, 8) == (1 + 2 + 3 + 6 + 7 + 8 + 0 + 0 + 1 + 4 + 5 + 6) / 2


@pytest.mark.parametrize(("num_queries", "num_keys"), [(70, 70), (23, 70), (1, 70)])
@pytest.mark.parametrize("window", [None, 9, 500])
def test_dense_attention_is_that_of_a_mask(
    lm: SimpleNamespace, num_queries: int, num_keys: int, window: int | None
) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, num_queries, 4, 16, device=lm.device)
    key, value = torch.randn(2, 2, num_keys, 2, 16, device=lm.device)
    position = torch.arange(num_keys - num_queries, num_keys, device=lm.device)[:, None]
    keys = torch.arange(num_keys, device=lm.device)
    seen = (keys <= position) & (keys > position - (window or num_keys + 1))

    def masked(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in tensors)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True).transpose(1, 2)

    exact = masked(query.double(), key.double(), value.double())
    ours = dense_attention(query, key, value, 0.3, window)
    assert (ours - exact).abs().max() <= 2 * (masked(query, key, value) - exact).abs().max() + 1e-7


def test_offsets_are_even_and_not_shared() -> None:
    even_offsets(10, 4, "cpu")[0] = 99
    assert even_offsets(10, 4, "cpu").tolist() == [0, 4, 8, 10]
