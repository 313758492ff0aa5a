from itertools import pairwise

import pytest
import torch

from draftattn.kernels.pooling import pool_blocks, pool_blocks_reference

OFFSETS = {
    "even": [0, 50, 100, 150, 200],
    "ragged-and-empty": [0, 63, 64, 64, 111, 175, 200],
    "uncovered": [3, 60, 101, 150],
    "one-block": [0, 64],
    "per-item": [[0, 64, 100, 100], [5, 6, 70, 130], [20, 20, 21, 22]],
}


def literal_means(x, offsets):
    rows = offsets.tolist() if offsets.ndim == 2 else [offsets.tolist()] * x.shape[0]
    means = torch.zeros(x.shape[0], len(rows[0]) - 1, *x.shape[2:], dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, (start, end) in enumerate(pairwise(row)):
            if end > start:
                means[i, j] = x[i, start:end].double().cpu().mean(0)
    return means


def poisoned(x, offsets):
    """NaN in every token outside the blocks."""
    position = torch.arange(x.shape[1], device=x.device)
    offsets = torch.atleast_2d(offsets).to(x.device)
    inside = (position >= offsets[:, :1]) & (position < offsets[:, -1:])
    return x.masked_fill(~inside[..., None, None], torch.nan)


@pytest.fixture(params=["plain", "dispatched", "triton"])
def pool(request, device):
    if request.param == "plain":
        return lambda x, offsets: pool_blocks_reference(x, offsets)
    if request.param == "dispatched":
        return pool_blocks
    pytest.importorskip("triton")
    from draftattn.kernels.triton_pooling import pool_blocks as pool_blocks_triton

    return pool_blocks_triton


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
def test_means(pool, offsets, dtype, device):
    offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
    batch = offsets.shape[0] if offsets.ndim == 2 else 2
    x = poisoned(torch.randn(batch, 200, 3, 20, device=device).to(dtype), offsets)
    pooled = pool(x, offsets)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double().cpu(), literal_means(x, offsets), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("layout", ["heads-first", "every-other-channel", "slice-of-fused-qkv"])
def test_any_strides(pool, layout, device):
    offsets = torch.tensor(OFFSETS["ragged-and-empty"], dtype=torch.int32, device=device)
    x = {
        "heads-first": torch.randn(2, 3, 200, 16, device=device).transpose(1, 2),
        "every-other-channel": torch.randn(2, 200, 3, 32, device=device)[..., ::2],
        "slice-of-fused-qkv": torch.randn(2, 200, 3, 3, 16, device=device)[:, :, 1],
    }[layout]
    torch.testing.assert_close(pool(x, offsets).double().cpu(), literal_means(x, offsets), rtol=2e-6, atol=2e-7)


def test_float64_and_its_gradient():
    offsets = torch.tensor(OFFSETS["per-item"], dtype=torch.int32)
    x = torch.randn(3, 130, 1, 2, dtype=torch.float64, requires_grad=True)
    pooled = pool_blocks(x, offsets)
    torch.testing.assert_close(pooled, literal_means(x, offsets))
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
