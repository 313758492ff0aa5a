"""Choosing blocks and listing them: plain torch against literal loops, the kernels against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from draftattn.kernels import selection
from draftattn.kernels.selection import BlockSelection, density_of_lists, list_blocks, select_from_rank, select_largest

INF, NAN = torch.inf, torch.nan


@pytest.fixture(params=["plain", "dispatched", "triton"])
def functions(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The functions of the module, in plain torch, as called, and in Triton (interpreted where there is no GPU)."""
    if request.param == "dispatched":
        return SimpleNamespace(
            select_largest=lambda scores, kept, bias=None, diagonal=False, tail=0: select_largest(
                scores, kept, bias=bias, keep_diagonal=diagonal, dense_tail=tail
            ),
            select_from_rank=lambda scores, rank, tail=0: select_from_rank(scores, rank, dense_tail=tail),
            list_blocks=list_blocks,
            density_of_lists=density_of_lists,
        )
    if request.param == "plain":
        largest, from_rank = selection.select_largest_reference, selection.select_from_rank_reference
        reference = selection.density_of_lists_reference
        rest = dict(list_blocks=selection.list_blocks_reference, density_of_lists=reference)
    else:
        pytest.importorskip("triton")
        from draftattn.kernels import triton_selection

        largest, from_rank = triton_selection.select_largest, triton_selection.select_from_rank
        density = triton_selection.density_of_lists
        rest = dict(list_blocks=triton_selection.list_blocks, density_of_lists=density)
    return SimpleNamespace(
        select_largest=lambda scores, kept, bias=None, diagonal=False, tail=0: BlockSelection(
            *largest(scores, kept, bias, diagonal, tail)
        ),
        select_from_rank=lambda scores, rank, tail=0: BlockSelection(*from_rank(scores, rank, tail)),
        **rest,
    )


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def literal_largest(scores: Tensor, kept: int, bias: Tensor | None, diagonal: bool, tail: int) -> Tensor:
    """The map of `select_largest`, by sorting every row in Python."""
    scores = scores.cpu() if bias is None else scores.cpu() + bias.cpu()
    rows, columns = scores.shape[-2:]
    block_map = torch.zeros(*scores.shape[:2], rows + tail, columns + tail, dtype=torch.bool)
    block_map[..., columns:] = True
    block_map[..., rows:, :] = True
    for item, head, i in ((b, h, i) for b in range(len(scores)) for h in range(scores.shape[1]) for i in range(rows)):
        values = [INF if value != value else value for value in scores[item, head, i].tolist()]
        order = sorted(range(columns), key=lambda j, row=values: (-row[j], j))
        if diagonal and i < columns:
            order.remove(i)
            order.insert(0, i)
        order = [j for j in order if values[j] > -INF or (diagonal and i == j)]
        block_map[item, head, i, order[:kept]] = True
    return block_map


def check(chosen: BlockSelection, expected: Tensor, capacity: int) -> None:
    """The map is the expected one, and the lists say the same."""
    assert torch.equal(chosen.block_map.cpu(), expected)
    assert chosen.kv_num_blocks.dtype == chosen.kv_indices.dtype == torch.int32
    assert chosen.kv_indices.shape == (*expected.shape[:3], capacity)
    rows = zip(
        expected.flatten(0, 2), chosen.kv_num_blocks.flatten().tolist(), chosen.kv_indices.flatten(0, 2), strict=True
    )
    for row, count, ids in rows:
        assert ids.tolist() == row.nonzero().flatten().tolist() + [0] * (capacity - count)


SIZES = [(5, 13), (1, 1), (3, 2), (7, 100), (4, 129), (2, 1025)]


@pytest.mark.usefixtures("poisoned_memory")
class TestLargest:
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_the_largest_of_each_row(self, functions: SimpleNamespace, size: tuple, share: float, device: str) -> None:
        scores = random_scores(2, 3, *size).to(device)
        kept = max(1, round(share * size[1]))
        check(functions.select_largest(scores, kept), literal_largest(scores, kept, None, False, 0), kept)

    @pytest.mark.parametrize("tail", [0, 2])
    @pytest.mark.parametrize("kept", [1, 2, 7, 19])
    def test_with_diagonal_bias_and_tail(self, functions: SimpleNamespace, kept: int, tail: int, device: str) -> None:
        scores, bias = random_scores(2, 2, 19, 19).to(device), random_scores(19, seed=1).to(device)
        chosen = functions.select_largest(scores, kept, bias, True, tail)
        check(chosen, literal_largest(scores, kept, bias, True, tail), kept if tail == 0 else 19 + tail)

    @pytest.mark.parametrize("diagonal", [False, True])
    @pytest.mark.parametrize("kept", [1, 3, 8, 20])
    def test_of_equal_scores_the_first(
        self, functions: SimpleNamespace, kept: int, diagonal: bool, device: str
    ) -> None:
        scores = random_scores(2, 2, 20, 20).round().to(device)
        assert len(scores.unique()) < 10
        check(
            functions.select_largest(scores, kept, None, diagonal),
            literal_largest(scores, kept, None, diagonal, 0),
            kept,
        )

    @pytest.mark.parametrize("diagonal", [False, True])
    @pytest.mark.parametrize("kept", [1, 2, 3, 6])
    def test_infinities_nan_and_both_zeros(
        self, functions: SimpleNamespace, kept: int, diagonal: bool, device: str
    ) -> None:
        rows = [
            [-INF, -INF, -INF, -INF, -INF, -INF],
            [INF, 1.0, NAN, -INF, 2.0, INF],
            [-0.0, 0.0, -1.0, -0.0, 0.0, -1e-45],
            [-INF, 3.0, -INF, -INF, -INF, -INF],
            [NAN, NAN, NAN, NAN, NAN, NAN],
            [-3.4e38, 3.4e38, -1e-45, 1e-45, -1.0, 1.0],
        ]
        scores = torch.tensor(rows, device=device)[None, None]
        check(
            functions.select_largest(scores, kept, None, diagonal),
            literal_largest(scores, kept, None, diagonal, 0),
            kept,
        )

    def test_low_precision_and_other_strides(self, functions: SimpleNamespace, device: str) -> None:
        scores = random_scores(2, 9, 9, 3).half().to(device).movedim(-1, 1)
        check(functions.select_largest(scores, 4), literal_largest(scores, 4, None, False, 0), 4)

    def test_long_rows(self, functions: SimpleNamespace, device: str) -> None:
        scores = random_scores(1, 1, 2, 8200).to(device)
        check(functions.select_largest(scores, 821), literal_largest(scores, 821, None, False, 0), 821)

    def test_no_rows(self, functions: SimpleNamespace, device: str) -> None:
        chosen = functions.select_largest(torch.empty(1, 0, 4, 4, device=device), 2)
        assert chosen.kv_indices.shape == (1, 0, 4, 2)


def literal_from_rank(scores: Tensor, rank: int, tail: int) -> Tensor:
    scores = scores.cpu().nan_to_num(nan=INF, posinf=INF, neginf=-INF)
    kept = torch.ones(*scores.shape[:2], scores.shape[2] + tail, scores.shape[3] + tail, dtype=torch.bool)
    for item, head in ((item, head) for item in range(scores.shape[0]) for head in range(scores.shape[1])):
        threshold = sorted(scores[item, head].flatten().tolist())[rank - 1]
        for i, row in enumerate(scores[item, head]):
            kept[item, head, i, : len(row)] = row >= min(threshold, row.max())
    return kept


@pytest.mark.usefixtures("poisoned_memory")
class TestFromRank:
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
    @pytest.mark.parametrize("size", [*SIZES, (100, 101)], ids=str)
    def test_rank_of_random_scores(self, functions: SimpleNamespace, size: tuple, share: float, device: str) -> None:
        scores = random_scores(2, 2, *size).to(device)
        rank = max(1, int(share * size[0] * size[1]))
        check(functions.select_from_rank(scores, rank), literal_from_rank(scores, rank, 0), size[1])

    @pytest.mark.parametrize("rank", [1, 200, 325, 361])
    def test_rank_of_a_draft_map_with_a_tail(self, functions: SimpleNamespace, rank: int, device: str) -> None:
        scores = torch.softmax(3 * random_scores(2, 2, 19, 19), -1).to(device)
        check(functions.select_from_rank(scores, rank, 3), literal_from_rank(scores, rank, 3), 22)

    @pytest.mark.parametrize("rank", [1, 100, 399, 400])
    def test_equal_scores_are_kept_together(self, functions: SimpleNamespace, rank: int, device: str) -> None:
        scores = random_scores(1, 2, 20, 20).round().to(device)
        check(functions.select_from_rank(scores, rank), literal_from_rank(scores, rank, 0), 20)

    @pytest.mark.parametrize("rank", [1, 2, 4, 5, 8, 9])
    def test_infinities_nan_and_both_zeros(self, functions: SimpleNamespace, rank: int, device: str) -> None:
        scores = torch.tensor([[-INF, NAN, INF], [-0.0, 0.0, -1e-45], [-INF, -1.0, 1.0]], device=device)[None, None]
        check(functions.select_from_rank(scores, rank), literal_from_rank(scores, rank, 0), 3)

    def test_numbers_that_differ_in_their_last_bit(self, functions: SimpleNamespace, device: str) -> None:
        order = torch.randperm(1600, generator=torch.Generator().manual_seed(0)).int()
        scores = (order + 0x3F000000).view(torch.float32).view(1, 1, 40, 40).to(device)
        for rank in (1, 255, 256, 257, 1000, 1600):
            check(functions.select_from_rank(scores, rank), literal_from_rank(scores, rank, 0), 40)

    def test_rank_zero_keeps_everything(self) -> None:
        chosen = select_from_rank(random_scores(1, 2, 3, 3), 0, dense_tail=1)
        check(chosen, torch.ones(1, 2, 4, 4, dtype=torch.bool), 4)


@pytest.mark.usefixtures("poisoned_memory")
class TestLists:
    @pytest.mark.parametrize("capacity", [1, 5, 70])
    @pytest.mark.parametrize("columns", [1, 5, 70])
    def test_true_entries_in_order(self, functions: SimpleNamespace, columns: int, capacity: int, device: str) -> None:
        block_map = random_scores(2, 3, 4, columns) > 0
        block_map[0, 0, 0], block_map[0, 0, 1] = False, True
        counts, ids = functions.list_blocks(block_map.to(device), capacity)
        for row, count, listed in zip(block_map.flatten(0, 2), counts.flatten(), ids.flatten(0, 2), strict=True):
            expected = row.nonzero().flatten().tolist()[:capacity]
            assert int(count) == len(expected)
            assert listed.tolist() == expected + [0] * (capacity - len(expected))

    def test_maps_shared_by_heads_and_in_other_strides(self, functions: SimpleNamespace, device: str) -> None:
        block_map = (random_scores(2, 1, 9, 4) > 0).transpose(2, 3).expand(2, 3, 4, 9).to(device)
        expected = functions.list_blocks(block_map.contiguous(), 9)
        assert all(torch.equal(x, y) for x, y in zip(functions.list_blocks(block_map, 9), expected, strict=True))

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("per_item", [False, True])
    def test_density(self, functions: SimpleNamespace, batch: int, per_item: bool, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(0, 129, (3 if per_item else 1, 300), generator=generator)
        queries = torch.randint(0, 129, (20,), generator=generator)
        offsets = torch.nn.functional.pad(lengths.cumsum(-1), (1, 0)).int()
        block_map = random_scores(batch, 2, 20, 300) > 0
        block_map[:, :, 2] = False
        counts, ids = list_blocks_of(block_map.to(device))
        ids[ids == 0] = 7  # what stands after the list is not looked at
        ids[..., 0] = torch.where(block_map[..., 0], 0, ids[..., 0].cpu()).to(device)
        query_offsets = torch.nn.functional.pad(queries.cumsum(0), (1, 0)).int().to(device)
        density = functions.density_of_lists(
            counts, ids, query_offsets, (offsets if per_item else offsets[0]).to(device)
        )
        shares = (block_map * lengths[:, None, None, :]).sum(-1).double() / lengths.sum(-1)[:, None, None]
        assert density.dtype == torch.float64
        assert density.item() == pytest.approx(((shares * queries).sum(-1) / queries.sum()).mean().item(), rel=1e-12)

    def test_density_of_more_pairs_than_an_int32_counts(self, functions: SimpleNamespace, device: str) -> None:
        offsets = torch.arange(0, 1001 * 128, 128, dtype=torch.int32, device=device)
        ids = torch.arange(250, dtype=torch.int32, device=device).expand(1, 1, 1000, 250).contiguous()
        counts = torch.full((1, 1, 1000), 250, dtype=torch.int32, device=device)
        assert functions.density_of_lists(counts, ids, offsets, offsets).item() == pytest.approx(0.25)


def list_blocks_of(block_map: Tensor) -> tuple[Tensor, Tensor]:
    return selection.list_blocks_reference(block_map, block_map.shape[-1])


OPERATORS = {
    "select_largest": lambda x: (x, 5, x[0, 0, 0], True, 0),
    "select_largest-tail": lambda x: (x, 5, None, False, 2),
    "select_from_rank": lambda x: (x, 100, 2),
    "list_blocks": lambda x: (x > 0, 5),
    "density_of_lists": lambda x: (
        *list_blocks_of(x > 0),
        *[torch.arange(15, dtype=torch.int32, device=x.device)] * 2,
    ),
}


@pytest.mark.parametrize(("name", "arguments"), OPERATORS.items(), ids=OPERATORS)
def test_operators_for_the_compiler(name: str, arguments: Callable[[Tensor], tuple], device: str) -> None:
    pytest.importorskip("triton")
    operator = getattr(torch.ops.draftattn, name.split("-")[0]).default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, arguments(random_scores(2, 2, 14, 14).to(device)), test_utils=checks)


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "triton"])
def test_compiled_without_a_graph_break(monkeypatch: pytest.MonkeyPatch, kernels: bool, device: str) -> None:
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(selection, "triton_serves", lambda x: True)
    offsets = torch.arange(0, 17 * 4, 4, dtype=torch.int32, device=device)

    def everything(scores: Tensor) -> tuple[Tensor, ...]:
        largest = select_largest(scores, 5, bias=scores[0, 0, 0], keep_diagonal=True, dense_tail=2)
        ranked = select_from_rank(scores, 100, dense_tail=2)
        listed = list_blocks(ranked.block_map, 7)
        return *largest, *ranked, *listed, density_of_lists(*listed, offsets, offsets)

    scores = random_scores(2, 2, 14, 14).to(device)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(scores)
    assert all(torch.equal(x, y) for x, y in zip(everything(scores), compiled, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_never_waits_for_the_device() -> None:
    scores = random_scores(2, 4, 60, 60).cuda()
    offsets = torch.arange(0, 61, dtype=torch.int32, device="cuda")

    def everything() -> tuple[Tensor, Tensor]:
        select_largest(scores, 7, keep_diagonal=True)
        chosen = select_from_rank(scores, 99)
        return chosen.block_map, density_of_lists(*list_blocks(chosen.block_map), offsets, offsets)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_map, density = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert density.item() == pytest.approx(block_map.double().mean().item())


class TestRefusals:
    @pytest.mark.parametrize("kept", [0, 5])
    def test_number_kept(self, kept: int) -> None:
        with pytest.raises(ValueError, match=f"num_kept is {kept}; a row of 4 scores keeps 1 to 4"):
            select_largest(torch.zeros(1, 1, 3, 4), kept)

    @pytest.mark.parametrize("rank", [-1, 13])
    def test_rank(self, rank: int) -> None:
        with pytest.raises(ValueError, match=f"rank is {rank}; 12 scores a head have ranks 1 to 12, or 0 for all"):
            select_from_rank(torch.zeros(1, 1, 3, 4), rank)

    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"scores must be floats \[B, H, Q, K\]; got torch.float32 \[3, 4\]"):
            select_largest(torch.zeros(3, 4), 1)
        with pytest.raises(ValueError, match=r"bias must be float32 \[4\]; got torch.float32 \[3\]"):
            select_largest(torch.zeros(1, 1, 3, 4), 1, bias=torch.zeros(3))
        with pytest.raises(ValueError, match="dense_tail is -1; it must not be negative"):
            select_from_rank(torch.zeros(1, 1, 3, 4), 1, dense_tail=-1)
