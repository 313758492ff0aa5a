"""Antidiagonal estimates of block pairs, against antidiagonals of the score matrix written out."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from draftattn.kernels import antidiagonal_mass as module
from draftattn.kernels.antidiagonal_mass import antidiagonal_mass, antidiagonal_mass_reference
from draftattn.kernels.backends import triton_interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# queries, keys, query heads, key heads, head_dim, block size, stride
SHAPES = [
    (100, 100, 4, 2, 16, 16, 4),
    (96, 96, 6, 2, 20, 48, 8),  # 6 groups a block: no power of two
    (45, 111, 2, 2, 32, 32, 1),
    (3, 70, 4, 1, 80, 16, 16),
    (1, 5, 2, 1, 16, 32, 8),
    (63, 300, 2, 1, 16, 128, 16),
    (528, 528, 1, 1, 16, 16, 16),
]


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The public function, through either implementation."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not (DEVICE.type == "cuda" or triton_interpreted()):
            pytest.skip("Triton needs a GPU or its interpreter")
    monkeypatch.setattr(module, "_kernel_serves", lambda *_: request.param == "triton")
    return request.param


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    num_queries, num_keys, heads, kv_heads, head_dim = shape[:5]
    generator = torch.Generator().manual_seed(num_queries + num_keys)
    query = torch.randn(2, num_queries, heads, head_dim, generator=generator) * 2
    key = torch.randn(2, num_keys, kv_heads, head_dim, generator=generator)
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype)


def literal(query: Tensor, key: Tensor, block_size: int, stride: int, scale: float) -> Tensor:
    """Every antidiagonal of every piece of the score matrix, in float64."""
    num_queries, num_keys, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    offset = num_keys - num_queries
    groups = -(-num_keys // stride)
    length = groups * stride
    placed = query.new_zeros(2, length, query.shape[2], query.shape[3], dtype=torch.float64)
    placed[:, offset:num_keys] = query.double()
    keys = key.new_zeros(2, length, *key.shape[2:], dtype=torch.float64)
    keys[:, :num_keys] = key.double()
    products = torch.einsum("bqhd,bkhd->bhqk", placed, keys.repeat_interleave(group, dim=2)) * (scale / stride)
    pieces = products.unflatten(3, (groups, stride)).unflatten(2, (groups, stride))
    scores = sum(pieces[:, :, :, stride - 1 - s, :, s] for s in range(stride))
    assert isinstance(scores, Tensor)
    index = torch.arange(groups, device=query.device)
    shares = scores.masked_fill(index > index[:, None], -torch.inf).softmax(-1)
    block = index // (block_size // stride)
    first, count = offset // block_size, -(-num_keys // block_size)
    out = shares.new_zeros(2, query.shape[2], count, count)
    for a in range(offset // stride, groups):
        out[:, :, block[a]].index_add_(-1, block, shares[:, :, a])
    return out[:, :, first:]


@pytest.mark.usefixtures("implementation", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key = case(shape, dtype)
    block_size, stride = shape[5], shape[6]
    expected = literal(query, key, block_size, stride, 0.4)
    actual = antidiagonal_mass(query, key, block_size, stride, scale=0.4)
    assert actual.dtype == torch.float32
    torchs = antidiagonal_mass_reference(query, key, block_size, stride, 0.4)
    assert (actual - expected).abs().max() <= 2 * (torchs - expected).abs().max() + 1e-5  # a GPU approximates exp2
    assert (torchs - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize(("name", "size"), [("torch", 1), ("triton", 400)])
def test_parts_and_strides_change_nothing(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = case((60, 80, 4, 2, 16))
    arguments = 16, 4, 0.4
    home: ModuleType
    if name == "triton":
        pytest.importorskip("triton")
        if not (DEVICE.type == "cuda" or triton_interpreted()):
            pytest.skip("Triton needs a GPU or its interpreter")
        from draftattn.kernels import triton_antidiagonal_mass

        function, limit, home = triton_antidiagonal_mass.antidiagonal_mass, "_CHUNK_SHARES", triton_antidiagonal_mass
    else:
        function, limit, home = antidiagonal_mass_reference, "_CHUNK_SCORES", module
    whole = function(query, key, *arguments)
    query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
    monkeypatch.setattr(home, limit, size)
    torch.testing.assert_close(function(query, key, *arguments), whole)
    query, key = (torch.stack([x, x.flip(-1)], dim=-1)[..., 0] for x in (query, key))
    assert query.stride(-1) == key.stride(-1) == 2
    torch.testing.assert_close(function(query, key, *arguments), whole)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("batch", "tokens"), [(0, 20), (2, 0)])
def test_nothing_gives_nothing(batch: int, tokens: int) -> None:
    query, key = torch.zeros(batch, tokens, 4, 16, device=DEVICE), torch.zeros(batch, tokens, 2, 16, device=DEVICE)
    blocks = -(-tokens // 16)
    assert antidiagonal_mass(query, key, 16, 4).shape == (batch, 4, blocks, blocks)


def test_bad_input_is_refused() -> None:
    query, key = case((20, 20, 4, 2, 16))
    with pytest.raises(ValueError, match="stride is 12; it must divide the block size 16"):
        antidiagonal_mass(query, key, 16, 12)
    with pytest.raises(ValueError, match="do not fit together"):
        antidiagonal_mass(query, key[:, :10], 16, 4)
    with pytest.raises(ValueError, match="key must be"):
        antidiagonal_mass(query, key[0], 16, 4)
