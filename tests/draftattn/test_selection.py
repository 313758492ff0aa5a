"""Choosing entries of a draft map."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from draftattn.selection import blocks_kept_per_row, select_per_head, select_per_row

SPARSITIES = [0, 0.1, 0.5, 0.55, 0.75, 0.9, 0.99]


def random_draft(batch: int = 3, heads: int = 2, blocks: int = 13, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(batch, heads, blocks, blocks, generator=generator), dim=-1)


def draft_with_flat_rows(blocks: int = 20) -> Tensor:
    """Half of the rows are uniform: under one threshold for all they keep nothing."""
    draft = random_draft(1, 2, blocks)
    draft[:, :, ::2] = 1 / blocks
    # told apart by one slightly larger entry, at the start of each row
    draft[:, :, ::2, 0] += 1e-3
    draft[:, :, 1::2, :3] = 0.3
    return draft


@pytest.mark.parametrize(
    ("num_blocks", "sparsity", "expected"),
    [(36, 0.75, 9), (36, 0.9, 4), (10, 0.9, 1), (10, 0.7, 3), (10, 0.3, 7), (3, 0.99, 1), (1, 0.5, 1), (7, 0, 7)],
)
def test_blocks_kept_per_row(num_blocks: int, sparsity: float, expected: int) -> None:
    assert blocks_kept_per_row(num_blocks, sparsity) == expected


class TestPerRow:
    @pytest.mark.parametrize("sparsity", SPARSITIES)
    def test_every_row_keeps_exactly_its_share_and_its_own_block(self, sparsity: float) -> None:
        selected = select_per_row(random_draft(), sparsity)
        assert selected.dtype == torch.bool
        assert (selected.sum(-1) == max(1, math.ceil((1 - sparsity) * 13 - 1e-9))).all()
        assert selected.diagonal(dim1=-2, dim2=-1).all()

    @pytest.mark.parametrize("sparsity", SPARSITIES)
    def test_the_rest_are_the_largest_others(self, sparsity: float) -> None:
        draft = random_draft()
        selected = select_per_row(draft, sparsity)
        others = ~torch.eye(13, dtype=torch.bool)
        lowest_kept = draft.masked_fill(~(selected & others), torch.inf).amin(-1)
        highest_dropped = draft.masked_fill(selected, -torch.inf).amax(-1)
        assert (lowest_kept >= highest_dropped).all()

    def test_its_own_block_stays_even_where_it_is_the_smallest(self) -> None:
        draft = random_draft()
        draft.diagonal(dim1=-2, dim2=-1).zero_()
        assert select_per_row(draft, 0.99).equal(torch.eye(13, dtype=torch.bool).expand(3, 2, 13, 13))

    def test_ties_do_not_change_the_count(self) -> None:
        selected = select_per_row(torch.full((1, 1, 8, 8), 0.125), 0.5)
        assert (selected.sum(-1) == 4).all()
        assert selected.diagonal(dim1=-2, dim2=-1).all()

    def test_the_draft_is_left_as_it_was(self) -> None:
        draft = random_draft()
        before = draft.clone()
        select_per_row(draft, 0.5)
        assert torch.equal(draft, before)


class TestPerHead:
    @pytest.mark.parametrize("sparsity", SPARSITIES)
    def test_keeps_the_entries_at_or_above_the_threshold(self, sparsity: float) -> None:
        draft = random_draft()
        selected = select_per_head(draft, sparsity)
        num_dropped = int(sparsity * 13 * 13)
        for item, head in ((item, head) for item in range(3) for head in range(2)):
            ranked = draft[item, head].flatten().sort().values
            # the threshold itself is kept, so one entry fewer than asked for is dropped
            kept = draft[item, head] >= ranked[max(num_dropped - 1, 0)]
            alone = ~kept.any(-1)
            assert torch.equal(selected[item, head][~alone], kept[~alone])

    def test_the_threshold_itself_is_kept(self) -> None:
        draft = torch.arange(16.0).view(1, 1, 4, 4)
        assert select_per_head(draft, 0.25).sum() == 13
        assert select_per_head(draft, 0.25)[0, 0, 0, 3]

    def test_entries_that_tie_with_the_threshold_are_all_kept(self) -> None:
        assert select_per_head(torch.full((1, 1, 4, 4), 0.25), 0.75).all()

    @pytest.mark.parametrize("sparsity", [0, 0.01])
    def test_dropping_less_than_one_entry_drops_none(self, sparsity: float) -> None:
        assert select_per_head(random_draft(blocks=4), sparsity).all()

    def test_a_row_that_would_be_empty_keeps_its_largest_entry_alone(self) -> None:
        draft = draft_with_flat_rows()
        flat = select_per_head(draft, 0.9)[:, :, ::2]
        assert flat[..., 0].all()
        assert not flat[..., 1:].any()

    def test_rescuing_a_row_changes_no_other(self) -> None:
        draft = draft_with_flat_rows()
        threshold = draft.flatten(-2).kthvalue(int(0.9 * 400), dim=-1).values[..., None, None]
        assert torch.equal(select_per_head(draft, 0.9)[:, :, 1::2], (draft >= threshold)[:, :, 1::2])


@pytest.mark.parametrize("select", [select_per_row, select_per_head])
class TestBoth:
    @pytest.mark.parametrize("sparsity", SPARSITIES)
    def test_no_row_is_ever_empty(self, select: object, sparsity: float) -> None:
        for draft in (random_draft(), random_draft(blocks=1), random_draft(blocks=2), draft_with_flat_rows()):
            assert select(draft, sparsity).any(-1).all()  # type: ignore[operator]

    def test_sparsity_zero_keeps_everything(self, select: object) -> None:
        assert select(random_draft(), 0).all()  # type: ignore[operator]

    def test_every_item_and_head_is_chosen_for_itself(self, select: object) -> None:
        draft = random_draft()
        together = select(draft, 0.75)  # type: ignore[operator]
        for item in range(3):
            for head in range(2):
                alone = select(draft[item : item + 1, head : head + 1], 0.75)  # type: ignore[operator]
                assert torch.equal(together[item, head], alone[0, 0])
        assert not torch.equal(together[0], together[1])
