import re
from itertools import pairwise

import pytest
import torch

from draftattn.kernels import probabilities
from draftattn.kernels.backends import triton_version
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.probabilities import block_probabilities

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_triton = pytest.mark.skipif(triton_version() is None, reason="needs Triton")
GPU = torch.cuda.is_available()


def literal(case, lse, reduce):
    """Every pair of tokens by itself, in float64."""
    case = case.to(torch.float64, "cpu")
    spec, mask = case.spec, case.mask
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    batch, _, heads, _ = case.query.shape
    block_map, whole_map = (
        x.repeat_interleave(heads // x.shape[1], 1).expand(batch, heads, -1, -1)
        for x in (mask.block_map, mask.whole_map)
    )
    out = torch.zeros(block_map.shape, dtype=torch.float64)
    for b, h, i, j in block_map.nonzero().tolist():
        offsets = torch.atleast_2d(mask.key_offsets)[b if mask.key_offsets.ndim == 2 else 0].tolist()
        rows, columns = range(*mask.query_offsets[i : i + 2].tolist()), range(*offsets[j : j + 2])
        if not rows or not columns:
            continue
        scores = case.query[b, rows, h] @ case.key[b, columns, h * case.key.shape[2] // heads].T * scale
        position = torch.tensor(rows)[:, None] + case.shift_of(b, i)
        column = torch.tensor(columns)
        seen = torch.ones(scores.shape, dtype=torch.bool)
        if spec.causal:
            seen &= column <= position
        if spec.window is not None and not whole_map[b, h, i, j]:
            seen &= (column > position - spec.window) | (column < case.start_of(b, i) + spec.sink)
        p = torch.where(seen, (scores - lse[b, h, rows, None].double().cpu()).exp(), 0.0)
        out[b, h, i, j] = p.max() if reduce == "max" else p.sum() / len(rows)
    return out


def probabilities_of(case, lse, reduce, backend):
    return block_probabilities(
        case.query, case.key, case.mask, lse, scale=case.spec.scale, causal=case.spec.causal, reduce=reduce,
        backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_against_single_pairs(case, backend, monkeypatch):
    if backend == "triton" and case.spec.dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter gets bf16 products wrong")
    if backend == "triton" and case.spec.batch * case.spec.heads * len(case.spec.query_blocks) > 36 and not GPU:
        pytest.skip("takes Triton's interpreter too long")
    monkeypatch.setattr(probabilities, "_CHUNK_SCORES", 50_000)  # several chunks
    reduces = ("max", "sum")
    if backend == "triton" and not GPU:  # the interpreter takes as long for a small tile as for a large one
        from draftattn.kernels import triton_probabilities

        monkeypatch.setattr(triton_probabilities, "choose_tiling", lambda *_: triton_probabilities.Tiling(64, 64, 4, 2))
        reduces = reduces[len(case.spec.name) % 2 :][:1]
    _, lse = case.to(torch.float64, "cpu").run("reference")
    for reduce in reduces:
        result = probabilities_of(case, lse.to(case.query.device), reduce, backend).cpu()
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), literal(case, lse, reduce), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_masses_add_up(make_case, backend):
    """To 1 with the LSE of the same mask, and to the share that a sparse mask keeps with that of the dense one."""
    options = dict(query_blocks=(37, 64, 50), causal=True, empty_row=False)
    sparse, dense = make_case(density=0.9, **options), make_case(density=2.0, **options)
    _, lse = dense.run("reference")
    mass = probabilities_of(dense, lse, "sum", backend)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), rtol=1e-5, atol=1e-5)
    kept = block_probabilities(dense.query, dense.key, sparse.mask, lse, causal=True, reduce="sum", backend=backend)
    torch.testing.assert_close(kept, mass.where(sparse.mask.block_map, 0.0))


@needs_triton
def test_blocks_larger_than_tiles_and_lists_in_parts(make_case):
    from draftattn.kernels import triton_probabilities
    from draftattn.kernels.triton_probabilities import Tiling

    case = make_case(
        query_blocks=(90, 40), key_blocks=(90, 33, 0, 90, 90, 64, 1, 90), block_size=90, causal=True, transposed=True
    )
    _, lse = case.run("reference")
    for maximum in (True, False):
        result = triton_probabilities.block_probabilities(
            case.query, case.key, case.mask, lse, scale=case.spec.head_dim**-0.5, causal=True, maximum=maximum,
            tiling=Tiling(32, 32, 4, 2),
        )  # fmt: skip
        expected = literal(case, lse, "max" if maximum else "sum")
        torch.testing.assert_close(result.double().cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_large(make_case, reduce):
    case = make_case(
        query_blocks=(112,) * 35 + (97,), block_size=128, causal=True, dtype=torch.bfloat16, heads=4, head_dim=128,
        mask_heads=4, density=0.4,
    )  # fmt: skip
    _, lse = case.run("triton")
    expected = probabilities_of(case, lse, reduce, "reference")
    torch.testing.assert_close(probabilities_of(case, lse, reduce, "triton"), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_rows_without_probabilities_count_as_nothing(make_case, backend):
    """An LSE of -inf belongs to a row that saw nothing, though this mask may show it keys."""
    case = make_case(query_blocks=(9, 20), block_size=20, density=2.0, empty_row=False)
    _, lse = case.run("reference")
    expected = probabilities_of(case, lse, "sum", "reference")[:, :, 1]
    lse[:, :, :9] = -torch.inf
    result = probabilities_of(case, lse, "sum", backend)
    assert not result[:, :, 0].any()
    torch.testing.assert_close(result[:, :, 1], expected)


def test_nothing_to_attend_to():
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    mask = BlockMask.from_block_map(torch.zeros(1, 1, 1, 1, dtype=torch.bool), offsets, offsets, block_size=4)
    query = torch.randn(1, 4, 1, 16)
    lse = torch.full((1, 1, 4), -torch.inf)
    assert not block_probabilities(query, query, mask, lse, backend="reference").any()


def test_refusals():
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    mask = BlockMask.from_block_map(torch.ones(1, 1, 1, 1, dtype=torch.bool), offsets, offsets, block_size=4)
    query, lse = torch.randn(1, 4, 2, 7), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match=re.escape("lse must be floating [1, 2, 4]; got torch.float32 [1, 4, 2]")):
        block_probabilities(query, query, mask, lse.transpose(1, 2))
    with pytest.raises(ValueError, match="reduce is 'mean'; choose max or sum"):
        block_probabilities(query, query, mask, lse, reduce="mean")
    with pytest.raises(ValueError, match="head_dim 7 is not one of"):
        block_probabilities(query, query, mask, lse, backend="triton")
    with pytest.raises(ValueError, match="differ in batch or head_dim"):
        block_probabilities(query, query[..., :3], mask, lse)


def test_pairwise_definition_of_the_sum(make_case):
    """The reference against softmax of the whole matrix, where every block is chosen."""
    case = make_case(query_blocks=(20, 13), block_size=20, density=2.0, empty_row=False, heads=1, kv_heads=1)
    _, lse = case.run("reference")
    p = (case.query[0, :, 0] @ case.key[0, :, 0].T * case.spec.head_dim**-0.5).softmax(-1)
    bounds = list(pairwise(case.mask.query_offsets.tolist()))
    expected = torch.stack([torch.stack([p[a:b, c:d].sum() / (b - a) for c, d in bounds]) for a, b in bounds])
    torch.testing.assert_close(probabilities_of(case, lse, "sum", "reference")[0, 0], expected)
