"""MoBA's gate: plain torch against loops in float64, the kernel against the best choices that float64 knows."""

import pytest
import torch

from draftattn.kernels.gathered_choice import choose_chunks, choose_chunks_reference, sort_pairs_reference

HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter gets bf16 products wrong


def make(dtype, device, num_queries=70, num_keys=75, heads=6, kv_heads=2, head_dim=24, batch=2):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, num_queries, heads + 1, head_dim, generator=generator).to(dtype)[:, :, 1:]
    key = torch.randn(batch, kv_heads, num_keys, head_dim, generator=generator).to(dtype).transpose(1, 2)
    return query.to(device), key.to(device)


def gate(query, key, chunk_size, dtype):
    """Products with all chunks but the last, ``[B, H_kv, N, G, C]``."""
    past = (key.shape[1] - 1) // chunk_size
    means = key[:, : past * chunk_size].to(dtype).unflatten(1, (past, chunk_size)).mean(2)
    return torch.einsum("bnhgd,bchd->bhngc", query.to(dtype).unflatten(2, (key.shape[2], -1)), means)


def assert_best(choice, query, key, first_position, chunk_size, force_first=False):
    """Distinct past chunks, none of which is worse than one left out by more than float32 can tell."""
    choice = choice.permute(0, 1, 3, 4, 2).long()
    position = first_position + torch.arange(query.shape[1], device=query.device)
    own = (position // chunk_size)[:, None, None]
    exact = gate(query, key, chunk_size, torch.float64)
    if force_first:
        assert (choice == 0).any(-1).all()
        exact[..., 0] = torch.inf
    chosen = torch.zeros_like(exact, dtype=torch.int32).scatter_add_(-1, choice, torch.ones_like(choice).int())
    assert chosen.max() == 1
    past = torch.arange(exact.shape[-1], device=query.device) < own
    assert not (chosen.bool() & ~past).any()
    worst = exact.masked_fill(chosen == 0, torch.inf).amin(-1)
    missed = exact.masked_fill((chosen == 1) | ~past, -torch.inf).amax(-1)
    # twice what float32 products of these lengths are off by
    size = gate(query.abs(), key.abs(), chunk_size, torch.float64).amax(-1)
    assert (missed <= worst + 2**-22 * size).all()


def chunks_of(chosen, num_chunks):
    """The chunks of pairs, from where they stand."""
    place, cu_seqlens = chosen
    units = torch.arange(place.shape[0] * place.shape[1], device=place.device).view(*place.shape[:2], 1, 1, 1)
    segment = torch.searchsorted(cu_seqlens.contiguous(), place, right=True) - 1
    return (segment - units * num_chunks).int()


CASES = [  # dtype, queries, keys, chunk size, chosen, first forced
    pytest.param(torch.float32, 70, 75, 5, 1, False, id="one chunk chosen"),
    pytest.param(HALF, 61, 75, 4, 3, True, id="first forced"),
    pytest.param(HALF, 40, 300, 70, 2, False, id="chunks longer than a tile"),
    pytest.param(torch.float32, 30, 90, 2, 7, False, id="more chunks than a tile holds"),
    pytest.param(HALF, 33, 270, 2, 12, True, id="more chunks than a tile holds, half"),
]


@pytest.mark.parametrize(("dtype", "num_queries", "num_keys", "chunk_size", "num_chosen", "force_first"), CASES)
def test_the_best_chunks_are_chosen_and_their_pairs_sorted(
    dtype, num_queries, num_keys, chunk_size, num_chosen, force_first, device, poisoned_memory
):
    from draftattn.kernels import triton_gathered_choice

    query, key = make(dtype, device, num_queries, num_keys)
    first, past = num_keys - num_queries, (num_keys - 1) // chunk_size
    skipped = max(num_chosen * chunk_size - first, 0)
    query, first = query[:, skipped:], first + skipped
    options = dict(chunk_size=chunk_size, num_chosen=num_chosen, force_first=force_first)
    ours = triton_gathered_choice.choose_chunks(query, key, first, *options.values())
    for place, cu_seqlens in (ours, choose_chunks(query, key, first_position=first, **options)):
        assert place.shape == (2, 2, num_chosen, query.shape[1], 3)
        assert place.dtype == cu_seqlens.dtype == torch.int32
        chunks = chunks_of((place, cu_seqlens), past)
        assert_best(chunks, query, key, first, chunk_size, force_first)
        # pairs of a chunk stand in the order of the queries
        again = sort_pairs_reference(chunks, past)
        assert torch.equal(place.sort(2).values, again.place)
        assert torch.equal(cu_seqlens, again.cu_seqlens)


def test_pairs_are_sorted_by_head_then_chunk_then_query():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 2, 11, 3, 9, generator=generator)
    scores[..., 3] = 2.0  # a chunk that all take, and one that none takes
    scores[..., 5] = -1.0
    chunks = scores.topk(4).indices.permute(0, 1, 4, 2, 3).int()
    place, cu_seqlens = sort_pairs_reference(chunks, 9)
    pairs = [
        (b, h, c, n, g, s)
        for b in range(2) for h in range(2) for n in range(11) for g in range(3)
        for s, c in enumerate(sorted(chunks[b, h, :, n, g].tolist()))
    ]  # fmt: skip
    for index, (b, h, _, n, g, s) in enumerate(sorted(pairs)):
        assert place[b, h, s, n, g] == index
    segments = torch.tensor([(b * 2 + h) * 9 + c for b, h, c, *_ in pairs])
    assert cu_seqlens.tolist() == [0, *torch.bincount(segments, minlength=36).cumsum(0).tolist()]


def test_the_reference_is_the_rule(device):
    query, key = make(torch.float32, device, num_queries=20, num_keys=33, head_dim=5)
    position = torch.arange(13, 33, device=device)
    choice = choose_chunks_reference(query, key, position, 4, 2, True)
    products = gate(query, key, 4, torch.float64)
    for b, h, n, g in ((b, h, n, g) for b in range(2) for h in range(2) for n in range(20) for g in range(3)):
        own = (13 + n) // 4
        best = max(range(1, own), key=lambda c, row=products[b, h, n, g]: row[c].item())
        assert choice[b, h, :, n, g].tolist() == [0, best]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_the_lowest_of_equal_chunks_is_chosen_and_nan_counts_as_infinity(dtype, device):
    """Products of small integers are exact, and many are equal."""
    from draftattn.kernels import triton_gathered_choice

    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-1, 2, (1, 30, 4, 16), generator=generator).to(device, dtype)
    key = torch.randint(-1, 2, (1, 160, 2, 16), generator=generator).to(device, dtype)
    key[:, 90] = torch.nan
    ours = chunks_of(triton_gathered_choice.choose_chunks(query, key, 130, 2, 6, False), 79)
    plain = choose_chunks_reference(query, key, torch.arange(130, 160, device=device), 2, 6, False)
    assert (plain == 45).any(2).all()
    assert torch.equal(ours.sort(2).values, plain.sort(2).values)


def test_means_keep_the_precision_of_float32(device):
    """Chunks that differ by less than the keys' dtype resolves are told apart, at any magnitude of the keys."""
    from draftattn.kernels import triton_gathered_choice

    for size in (1e-2, 1.0, 100.0):
        generator = torch.Generator().manual_seed(1)
        base = torch.rand(1, 1, 1, 1, 64, generator=generator) + 1
        # 16 keys a chunk, of which one differs
        key = (base.expand(1, 12, 16, 1, 64) * size).to(HALF).clone()
        key[:, torch.arange(12), torch.arange(12)] *= 1 + torch.randn(1, 12, 1, 64, generator=generator) * 0.02
        key = key.flatten(1, 2).to(device)
        query = torch.randn(1, 16, 2, 64, generator=generator).to(device, HALF)
        chosen = triton_gathered_choice.choose_chunks(query, key, 176, 16, 3, False)
        assert_best(chunks_of(chosen, 11), query, key, 176, 16)


def test_queries_with_too_few_chunks_are_refused(device):
    query, key = make(torch.float32, device, 20, 40)
    with pytest.raises(ValueError, match="num_chosen is 3; a query at 20 has 2 chunks of 8"):
        choose_chunks(query, key, first_position=20, chunk_size=8, num_chosen=3)
    with pytest.raises(ValueError, match="would stand at 40"):
        choose_chunks(query, key, first_position=21, chunk_size=8, num_chosen=1)
    with pytest.raises(ValueError, match="pairs of a query and a chunk"):
        choose_chunks(query[:, :, :1].expand(-1, -1, 10**8, -1), key, first_position=20, chunk_size=8, num_chosen=1)


def test_compiles_without_a_gpu(compile_ahead):
    jobs = ["choose:90:bf16:128", "choose-many:90:bf16:128", "choose:86:fp16:64"]
    for kernel in compile_ahead("compile_gathered.py", jobs):
        assert kernel["stack_bytes"] == 0, kernel
        # two programs of a multiprocessor, on every GPU
        assert kernel["shared_kb"] <= (113 if ":90:" in kernel["job"] else 49), kernel
