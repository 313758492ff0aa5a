from itertools import pairwise

import pytest
import torch

from draftattn.kernels import pooling
from draftattn.kernels.pooling import PoolRequest, pool_blocks, pool_reference, pool_together

OFFSETS = {
    "even": [0, 50, 100, 150, 200],
    "ragged-and-empty": [0, 63, 64, 64, 111, 175, 200],
    "uncovered": [3, 60, 101, 150],
    "one-block": [0, 64],
    "per-item": [[0, 64, 100, 100], [5, 6, 70, 130], [20, 20, 21, 22]],
}


def poisoned(x, offsets):
    """NaN in every token outside the blocks."""
    position = torch.arange(x.shape[1], device=x.device)
    offsets = torch.atleast_2d(offsets).to(x.device)
    inside = (position >= offsets[:, :1]) & (position < offsets[:, -1:])
    return x.masked_fill(~inside[..., None, None], torch.nan)


def literal_statistics(x, offsets):
    """Mean, maximum and mean square of every block, in float64."""
    rows = offsets.tolist() if offsets.ndim == 2 else [offsets.tolist()] * x.shape[0]
    result = torch.zeros(3, x.shape[0], len(rows[0]) - 1, *x.shape[2:], dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, (start, end) in enumerate(pairwise(row)):
            if end > start:
                block = x[i, start:end].double().cpu()
                result[:, i, j] = torch.stack([block.mean(0), block.amax(0), block.square().mean(0)])
    return result


@pytest.fixture(params=["plain", "dispatched", "triton"])
def pool_all(request):
    if request.param == "plain":
        return lambda requests: [pool_reference(one) for one in requests]
    if request.param == "dispatched":
        return pool_together
    pytest.importorskip("triton")
    from draftattn.kernels import triton_pooling

    return triton_pooling.pool_together


@pytest.fixture
def pool(pool_all):
    return lambda x, offsets: pool_all([PoolRequest(x, offsets)])[0].mean


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
def test_means(pool, offsets, dtype, device):
    offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
    batch = offsets.shape[0] if offsets.ndim == 2 else 2
    x = poisoned(torch.randn(batch, 200, 3, 20, device=device).to(dtype), offsets)
    pooled = pool(x, offsets)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double().cpu(), literal_statistics(x, offsets)[0], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("layout", ["heads-first", "every-other-channel", "slice-of-fused-qkv"])
def test_any_strides(pool, layout, device):
    offsets = torch.tensor(OFFSETS["ragged-and-empty"], dtype=torch.int32, device=device)
    x = {
        "heads-first": torch.randn(2, 3, 200, 16, device=device).transpose(1, 2),
        "every-other-channel": torch.randn(2, 200, 3, 32, device=device)[..., ::2],
        "slice-of-fused-qkv": torch.randn(2, 200, 3, 3, 16, device=device)[:, :, 1],
    }[layout]
    torch.testing.assert_close(pool(x, offsets).double().cpu(), literal_statistics(x, offsets)[0], rtol=2e-6, atol=2e-7)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
def test_all_statistics(pool_all, offsets, dtype, device):
    offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
    batch = offsets.shape[0] if offsets.ndim == 2 else 2
    # below zero, so that a maximum with a padding zero in it shows
    x = poisoned((torch.randn(batch, 200, 3, 20, device=device) - 6).to(dtype), offsets)
    (pooled,) = pool_all([PoolRequest(x, offsets, rounded=True, maximum=True, mean_square=True)])
    mean, maximum, mean_square = literal_statistics(x, offsets)
    torch.testing.assert_close(pooled.mean.double().cpu(), mean, rtol=2e-6, atol=2e-7)
    assert torch.equal(pooled.maximum.double().cpu(), maximum)
    torch.testing.assert_close(pooled.mean_square.double().cpu(), mean_square, rtol=2e-6, atol=2e-7)
    assert pooled.rounded.dtype == dtype
    # Triton's interpreter cuts bf16 instead of rounding it
    slack = 2**-7 if dtype == torch.bfloat16 and device == "cpu" else 0
    torch.testing.assert_close(pooled.rounded, pooled.mean.to(dtype), rtol=slack, atol=0)


@pytest.mark.usefixtures("poisoned_memory")
def test_tensors_of_several_shapes_and_wishes_together(pool_all, device):
    offsets = [
        torch.tensor(OFFSETS[name], dtype=torch.int32, device=device)
        for name in ("even", "per-item", "per-item", "one-block", "ragged-and-empty")
    ]
    shapes = [(3, 200, 6, 24), (3, 130, 2, 24), (3, 130, 2, 24), (1, 64, 1, 24), (2, 200, 3, 40)]
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    wishes = [{}, dict(rounded=True, maximum=True), dict(rounded=True), dict(mean_square=True), {}]
    requests = [PoolRequest(x, o, **wish) for x, o, wish in zip(tensors, offsets, wishes, strict=True)]
    for request, pooled in zip(requests, pool_all(requests), strict=True):
        mean, maximum, mean_square = literal_statistics(request.x, request.offsets)
        torch.testing.assert_close(pooled.mean.double().cpu(), mean, rtol=2e-6, atol=2e-7)
        assert (pooled.rounded is not None, pooled.maximum is not None, pooled.mean_square is not None) == request[2:]
        if request.maximum:
            assert torch.equal(pooled.maximum.double().cpu(), maximum)
        if request.mean_square:
            torch.testing.assert_close(pooled.mean_square.double().cpu(), mean_square, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_programs_of_several_heads_and_small_tiles(heads, device):
    triton_pooling = pytest.importorskip("draftattn.kernels.triton_pooling")
    offsets = torch.tensor(OFFSETS["ragged-and-empty"], dtype=torch.int32, device=device)
    x = torch.randn(2, 200, 3, 20, device=device)
    tiling = triton_pooling.Tiling(heads, tile=1024, num_warps=2)
    (pooled,) = triton_pooling.pool_together([PoolRequest(x, offsets, maximum=True)], tiling=tiling)
    mean, maximum, _ = literal_statistics(x, offsets)
    torch.testing.assert_close(pooled.mean.double().cpu(), mean, rtol=2e-6, atol=2e-7)
    assert torch.equal(pooled.maximum.double().cpu(), maximum)


@pytest.mark.parametrize("shape", [(0, 10, 2, 16), (1, 10, 0, 16), (1, 0, 2, 16)], ids=str)
def test_empty_tensors(pool, shape, device):
    offsets = torch.tensor([0, 0], dtype=torch.int32, device=device)
    pooled = pool(torch.randn(shape, device=device), offsets)
    assert pooled.shape == (shape[0], 1, *shape[2:])
    assert not pooled.any()


def test_operator_for_the_compiler(device):
    pytest.importorskip("triton")
    offsets = torch.tensor(OFFSETS["ragged-and-empty"], dtype=torch.int32, device=device)
    tensors = [
        torch.randn(1, 200, heads, 16, device=device).to(dtype) for heads, dtype in ((4, torch.half), (2, torch.float))
    ]
    arguments = (tensors, [offsets, offsets], 128, [True, True], [True, False], [False, True])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.draftattn.pool_blocks.default, arguments, test_utils=checks)


def test_compiled_without_a_graph_break(monkeypatch, device):
    """On a CPU the operator runs in Triton's interpreter, as if there were a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(pooling, "triton_serves", lambda x: True)
    offsets = torch.tensor(OFFSETS["ragged-and-empty"], dtype=torch.int32, device=device)
    tensors = [torch.randn(1, 200, heads, 16, device=device).half() for heads in (4, 2)]

    def both(query, key):
        requests = [PoolRequest(query, offsets), PoolRequest(key, offsets, rounded=True, maximum=True)]
        return pool_together(requests)

    for eager, compiled in zip(
        both(*tensors), torch.compile(both, fullgraph=True, backend="aot_eager")(*tensors), strict=True
    ):
        for x, y in zip(eager, compiled, strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("statistic", ["mean", "maximum", "mean_square", "rounded"])
def test_gradients(statistic):
    offsets = torch.tensor(OFFSETS["per-item"], dtype=torch.int32)
    x = torch.randn(3, 130, 2, 3, dtype=torch.float64, requires_grad=True)
    wish = {} if statistic == "mean" else {statistic: True}

    def pooled(x):
        return getattr(pool_together([PoolRequest(x, offsets, **wish)])[0], statistic)

    assert torch.autograd.gradcheck(pooled, x, fast_mode=True)


def test_float64_and_its_gradient():
    offsets = torch.tensor(OFFSETS["per-item"], dtype=torch.int32)
    x = torch.randn(3, 130, 1, 2, dtype=torch.float64, requires_grad=True)
    pooled = pool_blocks(x, offsets)
    torch.testing.assert_close(pooled, literal_statistics(x, offsets)[0])
    pooled.sum().backward()
    assert x.grad[0, 0, 0, 0].item() == pytest.approx(1 / 64)
    assert x.grad[1, 5, 0, 0].item() == 1.0
    assert not x.grad[1, :5].any()
    assert not x.grad[0, 100:].any()


def test_repeats_bit_for_bit(device):
    x = torch.randn(1, 2000, 4, 64, device=device)
    offsets = torch.arange(0, 2001, 100, dtype=torch.int32, device=device)
    assert torch.equal(pool_blocks(x, offsets), pool_blocks(x, offsets))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["triton", "plain"])
def test_never_waits_for_the_device(dtype):
    x = torch.randn(2, 500, 4, 64, device="cuda").to(dtype)
    offsets = torch.arange(0, 501, 100, dtype=torch.int32, device="cuda")
    pool_blocks(x, offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pool_blocks(x, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_refusals():
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="x must be"):
        pool_blocks(torch.zeros(4, 2, 8), offsets)
    with pytest.raises(ValueError, match=r"offsets must be \[N \+ 1\] or \[3, N \+ 1\]; got shape \[2, 2\]"):
        pool_blocks(torch.zeros(3, 4, 2, 8), offsets.expand(2, 2))
