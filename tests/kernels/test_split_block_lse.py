"""Log-sum-exps of blocks in two parts, against loops over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftattn.kernels import split_block_lse as module
from draftattn.kernels.backends import triton_interpreted
from draftattn.kernels.split_block_lse import split_block_lse, split_block_lse_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# queries, keys, query heads, key heads, head_dim, block size
SHAPES = [(21, 75, 6, 2, 16, 16), (20, 20, 2, 2, 80, 24), (5, 300, 4, 1, 32, 128), (1, 40, 3, 1, 16, 7)]


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function, through either implementation."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not (DEVICE.type == "cuda" or triton_interpreted()):
            pytest.skip("Triton needs a GPU or its interpreter")
    monkeypatch.setattr(module, "_kernel_serves", lambda *_: request.param == "triton")


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    num_queries, num_keys, heads, kv_heads, head_dim = shape[:5]
    generator = torch.Generator().manual_seed(num_queries + num_keys)
    query = torch.randn(2, num_queries, heads, head_dim, generator=generator)
    key = torch.randn(2, num_keys, kv_heads, head_dim, generator=generator)
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype)


def literal(query: Tensor, key: Tensor, block_size: int, scale: float) -> Tensor:
    """By distance: a part of a block holds the keys of one band of distances."""
    num_queries, num_keys, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    columns = -(-num_keys // block_size)
    keys = key.double().repeat_interleave(group, dim=2)
    out = torch.full((2, query.shape[2], num_queries, 2, columns), -torch.inf, dtype=torch.float64, device=DEVICE)
    for row in range(num_queries):
        position = num_keys - num_queries + row
        scores = torch.einsum("bhd,bkhd->bhk", query[:, row].double(), keys) * scale
        parts: dict[tuple[int, int], list[int]] = {}
        for j in range(position + 1):
            nearer = position // block_size - j // block_size - (position - j) // block_size
            parts.setdefault((nearer, j // block_size), []).append(j)
        for (nearer, block), members in parts.items():
            out[:, :, row, nearer, block] = scores[:, :, members].logsumexp(-1)
    return out


@pytest.mark.usefixtures("implementation", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key = case(shape, dtype)
    expected = literal(query, key, shape[5], 0.3)
    actual = split_block_lse(query, key, shape[5], scale=0.3)
    assert actual.dtype == torch.float32
    empty = expected == -torch.inf
    assert torch.equal(actual == -torch.inf, empty)
    torchs = split_block_lse_reference(query, key, shape[5], 0.3)
    error, torchs_error = ((x - expected).masked_fill(empty, 0.0).abs().max() for x in (actual, torchs))
    assert error <= 2 * torchs_error + 1e-5  # a GPU approximates exp2 and log2
    assert torchs_error <= (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.usefixtures("implementation")
def test_large_scores_strides_and_a_negative_scale() -> None:
    query, key = case((21, 75, 6, 2, 16))
    query = (20 * query).transpose(1, 2).contiguous().transpose(1, 2)
    key = key.transpose(2, 3).contiguous().transpose(2, 3)
    expected = literal(query, key, 16, -1.0).flatten(-2)
    actual = split_block_lse(query, key, 16, scale=-1.0).double().flatten(-2)
    torch.testing.assert_close(actual.softmax(-1), expected.softmax(-1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(actual.logsumexp(-1), expected.logsumexp(-1), rtol=1e-5, atol=1e-3)


def test_heads_may_be_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = case((21, 75, 6, 2, 16))
    whole = split_block_lse_reference(query, key, 16, 1.0)
    monkeypatch.setattr(module, "_CHUNK_SCORES", 1)
    torch.testing.assert_close(split_block_lse_reference(query, key, 16, 1.0), whole)


def test_bad_input_is_refused() -> None:
    query, key = case((20, 20, 4, 2, 16))
    with pytest.raises(ValueError, match="block_size is 200"):
        split_block_lse(query, key, 200)
    with pytest.raises(ValueError, match="do not fit together"):
        split_block_lse(query, key[:, :10], 16)
    with pytest.raises(ValueError, match="query must be"):
        split_block_lse(query[0], key, 16)
