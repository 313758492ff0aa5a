"""Log-sum-exps of blocks against a loop in float64."""

from itertools import pairwise

import pytest
import torch

from draftattn.kernels import block_lse as module
from draftattn.kernels.block_lse import block_lse, block_lse_reference

OFFSETS = {
    "ragged-and-empty": [0, 63, 64, 64, 111, 175, 200],
    "uncovered": [3, 60, 101, 150],
    "per-item": [[0, 64, 100, 100], [5, 6, 70, 130]],
}


def make_case(offsets, dtype, device, num_queries=35, head_dim=20, spread=1.0):
    offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
    query = spread * torch.randn(2, num_queries, 4, head_dim, device=device)
    key = torch.randn(2, 200, 2, head_dim, device=device).to(dtype)
    position = torch.arange(200, device=device)
    per_item = torch.atleast_2d(offsets)
    inside = (position >= per_item[:, :1]) & (position < per_item[:, -1:])
    return query, key.masked_fill(~inside[..., None, None], torch.nan), offsets


def literal_lse(query, key, offsets, scale):
    rows = offsets.tolist() if offsets.ndim == 2 else [offsets.tolist()] * 2
    query = query.to(key.dtype).double().cpu()
    result = torch.full((2, query.shape[2], query.shape[1], len(rows[0]) - 1), -torch.inf, dtype=torch.float64)
    for item, row in enumerate(rows):
        for block, (start, end) in enumerate(pairwise(row)):
            for head in range(query.shape[2] if end > start else 0):
                keys = key[item, start:end, head // 2].double().cpu()
                result[item, head, :, block] = (query[item, :, head] @ keys.T * scale).logsumexp(-1)
    return result


@pytest.fixture(params=["plain", "dispatched", "triton"])
def lse_of(request):
    if request.param == "plain":
        return block_lse_reference
    if request.param == "dispatched":
        return block_lse
    pytest.importorskip("triton")
    from draftattn.kernels import triton_block_lse

    return triton_block_lse.block_lse


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
def test_values(lse_of, offsets, dtype, device):
    query, key, offsets = make_case(offsets, dtype, device)
    actual = lse_of(query, key, offsets, 0.3)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double().cpu(), literal_lse(query, key, offsets, 0.3), rtol=1e-5, atol=1e-5)


def test_large_scores_and_a_negative_scale(lse_of, device):
    query, key, offsets = make_case(OFFSETS["ragged-and-empty"], torch.float32, device, num_queries=3, spread=100.0)
    actual = lse_of(query, key, offsets, -1.0)
    torch.testing.assert_close(actual.double().cpu(), literal_lse(query, key, offsets, -1.0), rtol=1e-5, atol=1e-3)


def test_heads_may_be_taken_in_parts(monkeypatch, device):
    query, key, offsets = make_case(OFFSETS["per-item"], torch.float32, device)
    whole = block_lse_reference(query, key, offsets, 1.0)
    monkeypatch.setattr(module, "_CHUNK_SCORES", 1)
    torch.testing.assert_close(block_lse_reference(query, key, offsets, 1.0), whole)


def test_compiles_whole(device):
    query, key, offsets = make_case(OFFSETS["ragged-and-empty"], torch.float16, device)
    compiled = torch.compile(block_lse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, offsets, 0.3), block_lse(query, key, offsets, 0.3))


def test_refusals():
    query, offsets = torch.randn(1, 8, 3, 4), torch.tensor([0, 4, 8])
    for key, message in ((torch.randn(2, 8, 3, 4), "must be"), (torch.randn(1, 8, 2, 4), "evenly")):
        with pytest.raises(ValueError, match=message):
            block_lse(query, key, offsets, 1.0)
    with pytest.raises(ValueError, match="offsets must be"):
        block_lse(query, query, torch.zeros(2, 3), 1.0)
