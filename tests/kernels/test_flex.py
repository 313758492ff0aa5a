from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from draftattn.kernels import flex
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.even_blocks import reasons_against_even, span, tile_lists
from draftattn.kernels.reference import attention_forward as reference_forward

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# On a GPU every case is compiled for seconds: those that differ in what is compiled.
COMPILED = ("ragged-lse", "residual-causal", "key-offsets-per-item", "uncovered-tokens", "window-sink-whole")


def test_against_float64(case, judge):
    if torch.cuda.is_available() and case.spec.name not in COMPILED:
        pytest.skip("compiles nothing new")
    judge(case, *case.run("flex", return_lse=case.spec.lse))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no backward pass on a CPU")
@pytest.mark.parametrize("kind", ["even", "even-causal", "ragged", "residual", "window"])
def test_gradients_equal_the_reference(make_case, kind, device):
    options = dict(query_blocks=(63, 48, 0, 20), block_size=64, batch=2, heads=4, kv_heads=2, mask_heads=4, density=0.6)
    options |= {
        "even": dict(query_blocks=(128, 128, 50), block_size=128),
        "even-causal": dict(query_blocks=(128, 128, 50), block_size=128, causal=True),
        "ragged": dict(uncovered=(3, 7)),
        "residual": dict(residual=True),
        "window": dict(causal=True, window=30, sink=4),
    }[kind]
    case = make_case(**options)
    tensors = [case.query, case.key, case.value, *(case.residual or ())]
    weight = torch.randn(case.query.shape, generator=torch.Generator().manual_seed(0)).to(device)
    gradients = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "flex")):
        inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
        residual = None if case.residual is None else type(case.residual)(*inputs[3:])
        moved = replace(case, query=inputs[0], key=inputs[1], value=inputs[2], residual=residual)
        output, lse = moved.run(backend)
        loss = (output * weight).sum() + lse[lse != -torch.inf].sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for exact, found in zip(*gradients, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_gradient_on_a_cpu_is_refused():
    query = torch.randn(1, 64, 2, 32, requires_grad=True)
    assert flex.reasons_against_flex(query, query, query) == ["it has no backward pass on a CPU"]
    with torch.no_grad():
        assert not flex.reasons_against_flex(query, query, query)


def dense_of(mask, batch: int, heads: int) -> torch.Tensor:
    """Token pairs that FlexAttention computes: those in full tiles, and in partial ones if the rule agrees."""
    query_length, key_length = mask.seq_lengths
    rule = create_mask(mask.mask_mod, batch, heads, query_length, key_length, device=mask.kv_indices.device)
    seen = torch.zeros_like(rule)
    for counts, ids, full in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        counts, ids = counts.expand(batch, heads, -1), ids.expand(batch, heads, -1, -1)
        for b in range(batch):
            for h in range(heads):
                for row, count in enumerate(counts[b, h].tolist()):
                    assert len(set(ids[b, h, row, :count].tolist())) == count
                    for column in ids[b, h, row, :count].tolist():
                        tile = (b, h, slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
                        assert not seen[tile].any(), "a tile is listed twice"
                        seen[tile] = rule[tile] | full
    return seen


def transposed(mask):
    """The mask of keys against queries, from the lists for the backward pass."""
    query_length, key_length = mask.seq_lengths
    lists = (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)

    def rule(batch, head, key_index, query_index):
        return mask.mask_mod(batch, head, query_index, key_index)

    return type(mask)(
        (key_length, query_length), *lists, None, None, None, None, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=rule
    )


def allowed_by_reference(case) -> torch.Tensor:
    """Token pairs that count: one-hot values show which keys a query's output holds."""
    batch, query_length, heads, _ = case.query.shape
    tokens = case.key.shape[1]
    shape = (batch, tokens, case.key.shape[2], tokens)
    values = torch.eye(tokens, dtype=torch.float64, device=case.key.device)[None, :, None].expand(shape)
    query, key = (
        torch.zeros(batch, n, h, tokens, dtype=torch.float64, device=case.key.device)
        for n, h in ((query_length, heads), (tokens, case.key.shape[2]))
    )
    weights, _ = reference_forward(
        query, key, values, case.mask, scale=1.0, causal=case.spec.causal, residual=None, return_lse=False
    )
    return weights.transpose(1, 2) > 0


RAGGED = [
    dict(query_blocks=(128, 128, 70, 128), block_size=128, density=0.6),
    dict(query_blocks=(128, 128, 70, 128), block_size=128, density=0.6, causal=True),
    dict(query_blocks=(60,) * 9, block_size=64, density=0.9, heads=4, mask_heads=2, uncovered=(5, 9)),
    dict(query_blocks=(128, 0, 128, 128), block_size=128, density=0.7, batch=2, key_offsets_per_item=True),
    dict(query_blocks=(128,) * 3, block_size=128, density=0.7, causal=True, window=100, sink=3, whole=True),
    dict(query_blocks=(100, 128), key_blocks=(128,) * 3, block_size=128, density=2.0, causal=True, shifts="block"),
]


@pytest.mark.parametrize("options", RAGGED, ids=lambda x: "-".join(map(str, x)))
def test_ragged_tiles_hold_exactly_the_chosen_pairs(make_case, options):
    case = make_case(**options)
    batch, query_length, heads, _ = case.query.shape
    lengths = dict(query_length=query_length, key_length=case.key.shape[1])
    mask = flex.ragged_mask(case.mask, **lengths, heads=heads, causal=case.spec.causal, transposed=True)
    expected = allowed_by_reference(case)
    assert torch.equal(dense_of(mask, batch, heads), expected)
    assert torch.equal(dense_of(transposed(mask), batch, heads), expected.transpose(-1, -2))


EVEN = [
    dict(query_blocks=(128,) * 4),
    dict(query_blocks=(128,) * 3 + (50,), mask_heads=4, heads=4),
    dict(query_blocks=(128,) * 3 + (50,), heads=4, kv_heads=2, mask_heads=2, causal=True),
    dict(query_blocks=(128, 128), key_blocks=(128,) * 3 + (37,), causal=True),
    dict(query_blocks=(128,) * 3 + (37,), key_blocks=(128, 128), causal=True),
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("options", EVEN, ids=lambda x: "-".join(map(str, x)))
def test_even_tiles_hold_exactly_the_chosen_pairs(make_case, options, backward):
    case = make_case(block_size=128, density=0.8, **options)
    batch, query_length, heads, _ = case.query.shape
    lengths = dict(query_length=query_length, key_length=case.key.shape[1])
    assert not reasons_against_even(case.mask, **lengths)
    mask = flex.even_mask(case.mask, **lengths, heads=heads, causal=case.spec.causal, transposed=backward)
    expected = allowed_by_reference(case)
    assert torch.equal(dense_of(mask, batch, heads), expected)
    if backward:
        assert torch.equal(dense_of(transposed(mask), batch, heads), expected.transpose(-1, -2))
    if not case.spec.causal:
        assert not mask.kv_num_blocks.any(), "whole blocks run without a rule for single tokens"


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([0, 128, 256, 300], (0, 300, True)),
        ([0, 128], (0, 128, True)),
        ([0, 100, 228], (0, 228, False)),
        ([128, 256], (128, 256, False)),
        ([0, 128, 128], (0, 128, False)),
    ],
    ids=str,
)
def test_span(offsets, expected):
    assert span(torch.tensor(offsets, dtype=torch.int32)) == expected


def test_what_is_not_even_is_named():
    offsets = torch.tensor([0, 100, 228], dtype=torch.int32)
    mask = BlockMask.from_block_map(torch.ones(1, 1, 2, 2, dtype=torch.bool), offsets, offsets)
    assert len(reasons_against_even(mask, 228, 228)) == 2
    small = BlockMask.from_block_map(torch.ones(1, 1, 2, 2, dtype=torch.bool), offsets // 2, offsets // 2, 64)
    for name, reason in zip(("query", "key"), reasons_against_even(small, 114, 114), strict=True):
        assert reason == f"{name} blocks hold 64 tokens, not 128"


def test_tile_lists_sort_a_causal_row_by_what_its_queries_see():
    offsets = torch.arange(0, 641, 128, dtype=torch.int32)
    block_map = torch.tensor([[1, 0, 1, 1, 1]] * 5, dtype=torch.bool)[None, None]
    lists = tile_lists(BlockMask.from_block_map(block_map, offsets, offsets), 640, 640, causal=True)
    assert lists.full_counts.tolist() == [[[0, 1, 1, 2, 3]]]
    assert lists.partial_counts.tolist() == [[[1, 0, 1, 1, 1]]]
    assert lists.partial_ids[0, 0, [0, 2, 3, 4], 0].tolist() == [0, 2, 3, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_even_road_on_a_gpu(make_case, judge, causal):
    options = dict(heads=4, kv_heads=2, mask_heads=4, head_dim=128, density=0.4, lse=True, dtype=torch.bfloat16)
    case = make_case(query_blocks=(128,) * 7 + (65,), block_size=128, causal=causal, **options)
    judge(case, *case.run("flex"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_a_gpu_is_not_that_of_all_scores(device):
    tokens = 32768
    offsets = torch.arange(0, tokens + 1, 128, dtype=torch.int32, device=device)
    mask = BlockMask.from_block_map(torch.eye(256, dtype=torch.bool, device=device)[None, None], offsets, offsets)
    query = torch.randn(1, tokens, 4, 64, dtype=torch.bfloat16, device=device)
    torch.cuda.reset_peak_memory_stats()
    flex.attention_forward(query, query, query, mask, scale=0.125, causal=False, residual=None, return_lse=False)
    assert torch.cuda.max_memory_allocated() < 2**30
