import subprocess
import sys
import warnings

import pytest
import torch

from draftattn.kernels import backends
from draftattn.kernels.api import BlockMeans, block_sparse_attention
from draftattn.kernels.block_mask import BlockMask

OFFSETS = torch.tensor([0, 16, 30], dtype=torch.int32)
MASK = BlockMask.from_block_map(torch.ones(1, 1, 2, 2, dtype=torch.bool), OFFSETS, OFFSETS, 16)


def tensors(batch=1, length=30, heads=2, head_dim=16, dtype=torch.float32):
    return torch.zeros(batch, length, heads, head_dim, dtype=dtype)


def mask_of(batch, heads):
    return BlockMask.from_block_map(torch.ones(batch, heads, 2, 2, dtype=torch.bool), OFFSETS, OFFSETS, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(query=torch.zeros(30, 2, 16)), r"query must be \[batch, .*; got shape \[30, 2, 16\]"),
        (dict(key=tensors(dtype=torch.float16)), "must share a floating dtype; key is torch.float16"),
        (dict(query=tensors(dtype=torch.int32)), "must share a floating dtype; query is torch.int32"),
        (dict(value=tensors().to("meta")), "must be on one device; value is on meta"),
        (dict(value=tensors(length=29)), "key and value must have one shape"),
        (dict(key=tensors(batch=2), value=tensors(batch=2)), "differ in batch or head_dim"),
        (dict(key=tensors(head_dim=8), value=tensors(head_dim=8)), "differ in batch or head_dim"),
        (dict(key=tensors(heads=3), value=tensors(heads=3)), "2 query heads cannot share 3 key heads evenly"),
        (dict(block_mask=mask_of(3, 1)), "block_mask is for batch 3 and 1 heads; query has batch 1 and 2 heads"),
        (dict(block_mask=mask_of(1, 3)), "block_mask is for batch 1 and 3 heads"),
        (
            dict(block_mask=BlockMask(MASK.kv_num_blocks, MASK.kv_indices, OFFSETS, OFFSETS.expand(2, 3), 16)),
            "key_offsets is for 2 batch items; query has 1",
        ),
        (dict(residual=BlockMeans(tensors(length=2), tensors(length=3))), r"residual.value must be \[1, 2, 2, 16\]"),
        (dict(residual=BlockMeans(*[tensors(length=2).double()] * 2)), "residual.key must be .* torch.float32"),
        (dict(backend="cuda"), "backend is 'cuda'; choose from auto, reference, cpu, triton"),
    ],
    ids=[
        "rank", "dtypes-differ", "integers", "devices-differ", "key-and-value-differ", "batch", "head-dim", "gqa",
        "mask-batch", "mask-heads", "offsets-batch", "residual-shape", "residual-dtype", "unknown-backend",
    ],
)  # fmt: skip
def test_refusals(changes, message):
    arguments = dict(query=tensors(), key=tensors(), value=tensors(), block_mask=MASK)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**(arguments | changes))


def test_a_refusing_backend_names_every_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    x = torch.zeros(1, 30, 24, 2, dtype=torch.float64).transpose(2, 3).requires_grad_()
    with pytest.raises(ValueError, match="backend 'triton' cannot serve this call") as refusal:
        block_sparse_attention(x, x, x, MASK, backend="triton")
    for reason in (
        "sees no CUDA",
        "tensors are on cpu",
        "float64 is not fp16",
        "head_dim 24 is not one of",
        "last dimension of query is not contiguous",
        "last dimension of value is not contiguous",
    ):
        assert reason in str(refusal.value)


def test_auto_takes_the_backend_of_the_device(device):
    x = tensors().to(device)
    assert backends.choose_backend("auto", x, x, x) == ("triton" if device == "cuda" else "cpu")
    x = torch.rand(1, 128, 2, 128, dtype=torch.bfloat16, device=device)
    on_hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    assert backends.choose_backend("auto", x, x, x) == (
        "hopper" if on_hopper else "triton" if device == "cuda" else "cpu"
    )


def test_auto_warns_once_before_it_is_slow(monkeypatch):
    x = tensors().to("meta")
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(UserWarning, match="slow reference backend .cpu: tensors are on meta"):
        assert backends.choose_backend("auto", x, x, x) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend("auto", x, x, x) == "reference"


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
def test_every_backend_returns_what_is_asked_for(make_case, backend, device):
    if backend == "cpu" and device != "cpu":
        pytest.skip("needs tensors on the CPU")
    if backend == "triton":
        pytest.importorskip("triton")
    case = make_case(query_blocks=(32, 17), block_size=32, head_dim=16)
    only = block_sparse_attention(case.query, case.key, case.value, case.mask, backend=backend)
    both = block_sparse_attention(case.query, case.key, case.value, case.mask, backend=backend, return_lse=True)
    assert isinstance(only, torch.Tensor)
    assert len(both) == 2
    torch.testing.assert_close(only, both[0])
    assert both[1].shape == (1, 2, 49)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("sizes", [(0, 2, 30), (1, 0, 30), (1, 2, 0)], ids=["no-batch", "no-queries", "no-keys"])
def test_nothing_in_nothing_out(backend, sizes, device):
    if backend == "cpu" and device != "cpu":
        pytest.skip("needs tensors on the CPU")
    if backend == "triton":
        pytest.importorskip("triton")
    batch, num_query_blocks, key_length = sizes
    query = torch.ones(batch, 15 * num_query_blocks, 2, 16, device=device)
    key = torch.ones(batch, key_length, 2, 16, device=device)
    offsets = (torch.arange(num_query_blocks + 1, dtype=torch.int32) * 15).to(device)
    key_offsets = torch.tensor([0, key_length], dtype=torch.int32, device=device)
    block_map = torch.ones(1, 1, num_query_blocks, 1, dtype=torch.bool, device=device)
    mask = BlockMask.from_block_map(block_map, offsets, key_offsets, 30)
    out, lse = block_sparse_attention(query, key, key, mask, return_lse=True, backend=backend)
    assert out.shape == query.shape
    assert not out.any()
    assert bool((lse == -torch.inf).all())


def test_import_needs_no_triton():
    script = "import sys; import draftattn.kernels.api, draftattn.kernels.cpu; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
