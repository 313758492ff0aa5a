"""Weighted means of blocks against a loop in float64."""

from itertools import pairwise

import pytest
import torch

from draftattn.kernels import weighted_pooling
from draftattn.kernels.pooling import pool_blocks
from draftattn.kernels.weighted_pooling import pool_weighted, pool_weighted_reference

OFFSETS = {
    "ragged-and-empty": [0, 63, 64, 64, 111, 175, 200],
    "uncovered": [3, 60, 101, 150],
    "per-item": [[0, 64, 100, 100], [5, 6, 70, 130]],
}


def make_case(offsets, dtype, device, head_dim=20, spread=3.0):
    offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
    key, value = (torch.randn(2, 200, 3, head_dim, device=device).to(dtype) for _ in range(2))
    position = torch.arange(200, device=device)
    per_item = torch.atleast_2d(offsets)
    inside = (position >= per_item[:, :1]) & (position < per_item[:, -1:])
    key, value = (x.masked_fill(~inside[..., None, None], torch.nan) for x in (key, value))
    return key, value, spread * torch.randn(2, 3, head_dim, device=device), offsets


def literal_means(key, value, direction, offsets):
    rows = offsets.tolist() if offsets.ndim == 2 else [offsets.tolist()] * 2
    result = torch.zeros(2, 2, len(rows[0]) - 1, *key.shape[2:], dtype=torch.float64)
    for item, row in enumerate(rows):
        for block, (start, end) in enumerate(pairwise(row)):
            for head in range(key.shape[2] if end > start else 0):
                keys, values = (x[item, start:end, head].double().cpu() for x in (key, value))
                weights = torch.softmax(keys @ direction[item, head].double().cpu(), 0)
                result[:, item, block, head] = torch.stack([weights @ keys, weights @ values])
    return result


@pytest.fixture(params=["plain", "dispatched", "triton"])
def pool(request):
    if request.param == "plain":
        return pool_weighted_reference
    if request.param == "dispatched":
        return pool_weighted
    pytest.importorskip("triton")
    from draftattn.kernels import triton_weighted_pooling

    return triton_weighted_pooling.pool_weighted


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
def test_means(pool, offsets, dtype, device):
    case = make_case(offsets, dtype, device)
    expected = literal_means(*case)
    # one rounding to the dtype, and a softmax in float32
    tolerance = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for actual, exact in zip(pool(*case), expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double().cpu(), exact, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("head_dim", [20, 100], ids=["one tile a block", "several tiles a block"])
@pytest.mark.parametrize("spread", [0.2, 300.0], ids=["even", "too large for exp"])
def test_whatever_the_scores(pool, spread, head_dim, device):
    case = make_case(OFFSETS["ragged-and-empty"], torch.float32, device, head_dim, spread)
    # scores of some thousands are rounded to some ten-thousandths
    tolerance = 1e-5 if spread < 1 else 1e-2
    for actual, exact in zip(pool(*case), literal_means(*case), strict=True):
        torch.testing.assert_close(actual.double().cpu(), exact, rtol=tolerance, atol=tolerance)


def test_any_strides(pool, device):
    offsets = torch.tensor(OFFSETS["ragged-and-empty"], dtype=torch.int32, device=device)
    key = torch.randn(2, 3, 200, 32, device=device)[..., ::2].transpose(1, 2)
    value = torch.randn(2, 200, 3, 3, 16, device=device)[:, :, 1]
    direction = torch.randn(2, 16, 3, device=device).transpose(1, 2)
    for actual, exact in zip(
        pool(key, value, direction, offsets), literal_means(key, value, direction, offsets), strict=True
    ):
        torch.testing.assert_close(actual.double().cpu(), exact, rtol=1e-5, atol=1e-5)


def test_no_direction_gives_plain_means(pool, device):
    key, value, direction, offsets = make_case(OFFSETS["per-item"], torch.float32, device)
    for actual, x in zip(pool(key, value, torch.zeros_like(direction), offsets), (key, value), strict=True):
        torch.testing.assert_close(actual, pool_blocks(x, offsets))


def test_gradients(device):
    key, value, direction, offsets = make_case([0, 5, 5, 12], torch.float64, device, head_dim=3)
    key, value = (x[:, :12, :2].contiguous().requires_grad_() for x in (key, value))
    direction = direction[:, :2].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: pool_weighted(*x, offsets), (key, value, direction))


def test_compiles_whole(device):
    case = make_case(OFFSETS["ragged-and-empty"], torch.float16, device)
    compiled = torch.compile(pool_weighted, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*case), pool_weighted(*case), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the operator holds a GPU kernel")
def test_operator(device):
    case = make_case(OFFSETS["per-item"], torch.float16, device)
    torch.library.opcheck(weighted_pooling._pool_weighted_op, (*case, 128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.randn(1, 8, 2, 4)}, "one shape and dtype"),
        ({"direction": torch.randn(1, 3, 4)}, "direction must be"),
        ({"offsets": torch.zeros(3, 3, dtype=torch.int32)}, "offsets must be"),
    ],
)
def test_refusals(change, message):
    x = torch.randn(1, 8, 1, 4)
    call = {"key": x, "value": x, "direction": torch.randn(1, 1, 4), "offsets": torch.tensor([0, 4, 8])} | change
    with pytest.raises(ValueError, match=message):
        pool_weighted(**call)
