"""Queries in the order of their chunks: plain torch and the kernels against loops."""

import pytest
import torch

from draftattn.kernels import gathered_queries
from draftattn.kernels.gathered_queries import gather_queries, gather_queries_reference, gathered_mask


def make_place(device, length=45):
    """Places of two items, two key heads, three chunks a query, and three heads a group."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(2 * 2 * 3 * length * 3, generator=generator).view(2, 2, 3, length, 3).int().to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 20, 128])
def test_queries_go_to_their_places(dtype, head_dim, device, poisoned_memory):
    from draftattn.kernels import triton_gathered_queries

    place = make_place(device)
    query = torch.randn(2, 45, 7, head_dim, device=device).to(dtype)[:, :, 1:]
    for gather in (gather_queries, gather_queries_reference, triton_gathered_queries.gather_queries):
        packed = gather(query, place)
        assert packed.shape == (place.numel(), head_dim)
        for b, h, s, n, g in ((0, 0, 0, 0, 0), (1, 1, 2, 44, 2), (1, 0, 1, 20, 1)):
            assert torch.equal(packed[place[b, h, s, n, g]], query[b, n, h * 3 + g])
        assert torch.equal(packed[place[:, :, 1].long()].transpose(1, 2).flatten(2, 3), query)


def test_gathering_has_gradients(device):
    place = make_place(device, length=4)
    query = torch.randn(2, 4, 6, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_queries(x, place), [query])


@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "triton"])
def test_gradients_of_one_query_are_rounded_once(kernel, device, monkeypatch):
    monkeypatch.setattr(gathered_queries, "triton_serves", lambda x: kernel)
    place = make_place(device)
    query = torch.randn(2, 45, 6, 20, device=device).half().requires_grad_()
    upstream = torch.randn(place.numel(), 20, device=device).half()
    packed = gather_queries(query, place)
    assert torch.equal(packed, gather_queries_reference(query, place))
    (gradient,) = torch.autograd.grad(packed, query, upstream)
    exact = upstream.double()[place.long()].sum(2).transpose(1, 2).flatten(2, 3)
    assert (gradient - exact).norm() <= 1.001 * (exact.half() - exact).norm()


@pytest.mark.parametrize(
    "lengths", [[0, 300, 0, 128, 5, 0], [0, 0, 0, 0, 0, 0], [1, 129, 256, 0, 0, 700], [0, 0, 0, 0, 0, 32000]]
)
def test_chunks_become_blocks(lengths, device, poisoned_memory):
    """Two heads of three chunks with two key blocks each, and one more key block at their ends."""
    from draftattn.kernels import triton_gathered_queries

    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    starts = torch.stack([ends, ends + 9], 1).flatten()[::2].to(device)  # not contiguous
    total = sum(lengths)
    for lists in (triton_gathered_queries.gathered_lists, gathered_queries.gathered_lists_reference):
        offsets, counts, ids = lists(starts, total, 3, 2, 7)
        blocks = [(ends[i] + first, i) for i, length in enumerate(lengths) for first in range(0, length, 128)]
        surplus = total // 128 + 6 - len(blocks)
        assert offsets.tolist() == [*(start for start, _ in blocks), *[total] * (surplus + 1)]
        assert counts.tolist() == [2] * (len(blocks) + surplus)
        segments = [i for _, i in blocks] + [5] * surplus
        assert ids.tolist() == [[i // 3 * 7 + i % 3 * 2, i // 3 * 7 + i % 3 * 2 + 1] for i in segments]
    mask = gathered_mask(starts, total, 3, 2, torch.arange(15, dtype=torch.int32, device=device))
    assert torch.equal(mask.kv_indices[0, 0], ids)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes a file with holes of 13 GB")
def test_places_of_chunks_may_be_far_apart(tmp_path, poisoned_memory):
    from draftattn.kernels import triton_gathered_queries

    apart = 2**30
    spread = torch.from_file(str(tmp_path / "holes"), shared=True, size=3 * apart + 1, dtype=torch.int32)
    starts = torch.tensor([0, 130, 140, 300], dtype=torch.int32)
    spread[::apart] = starts
    found = triton_gathered_queries.gathered_lists(spread[::apart], 300, 3, 1, 3)
    expected = gathered_queries.gathered_lists_reference(starts, 300, 3, 1, 3)
    for mine, plain in zip(found, expected, strict=True):
        assert torch.equal(mine, plain)
