"""Log-sum-exps over compressed keys, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftattn.kernels import compressed_lse as module
from draftattn.kernels.backends import triton_interpreted
from draftattn.kernels.compressed_lse import compressed_lse, compressed_lse_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# queries, compressed keys, query heads, key heads, head_dim
SHAPES = [(13, 37, 6, 2, 16), (70, 150, 4, 4, 80), (3, 200, 8, 1, 32), (5, 0, 2, 2, 16), (2, 1, 3, 1, 16)]


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function, through either implementation."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not (DEVICE.type == "cuda" or triton_interpreted()):
            pytest.skip("Triton needs a GPU or its interpreter")
    monkeypatch.setattr(module, "_kernel_serves", lambda query, key: request.param == "triton")


def case(
    length: int, count: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and visible counts; keys that no query sees hold NaN."""
    generator = torch.Generator().manual_seed(length + count)
    query = torch.randn(2, length, heads, head_dim, generator=generator).to(DEVICE, dtype)
    key = torch.randn(2, count + 3, kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    visible = torch.randint(0, count + 1, (length,), generator=generator, dtype=torch.int32).sort().values
    visible[0], visible[-1] = 0, count
    key[:, count:] = torch.nan
    return query, key, visible.to(DEVICE)


def exact(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    group = query.shape[2] // key.shape[2]
    rows = [
        torch.einsum("bhd,bchd->bhc", query[:, t].double(), key[:, :seen].double().repeat_interleave(group, 2)) * scale
        for t, seen in enumerate(visible.tolist())
    ]
    return torch.stack([row.logsumexp(-1) for row in rows], dim=-1)


@pytest.mark.usefixtures("implementation", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    query, key, visible = case(*shape, dtype=dtype)
    expected = exact(query, key, visible, 0.3)
    actual = compressed_lse(query, key, visible, scale=0.3)
    assert actual.dtype == torch.float32
    blind = expected == -torch.inf
    assert bool(blind[:, :, 0].all())
    assert torch.equal(actual == -torch.inf, blind)
    torchs = compressed_lse_reference(query, key, visible, 0.3)
    error, torchs_error = ((x - expected).masked_fill(blind, 0.0).abs().max() for x in (actual, torchs))
    assert error <= 2 * torchs_error + 1e-5  # a GPU approximates exp2 and log2


@pytest.mark.usefixtures("implementation")
def test_large_scores_strides_and_a_negative_scale() -> None:
    query, key, visible = case(13, 37, 6, 2, 16)
    query = (100 * query).transpose(1, 2).contiguous().transpose(1, 2)
    key = key.transpose(2, 3).contiguous().transpose(2, 3)
    visible = visible.flip(0)
    actual = compressed_lse(query, key, visible, scale=-1.0)
    torch.testing.assert_close(actual.double(), exact(query, key, visible, -1.0), rtol=1e-5, atol=1e-3)


def test_queries_may_be_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, visible = case(13, 37, 6, 2, 16)
    whole = compressed_lse_reference(query, key, visible, 1.0)
    monkeypatch.setattr(module, "_CHUNK_SCORES", 1)
    torch.testing.assert_close(compressed_lse_reference(query, key, visible, 1.0), whole)


def test_bad_input_is_refused() -> None:
    query, key, visible = case(13, 37, 6, 2, 16)
    with pytest.raises(ValueError, match="visible must be int32"):
        compressed_lse(query, key, visible.long())
    with pytest.raises(ValueError, match="do not fit together"):
        compressed_lse(query[:, :, :5], key, visible)
    with pytest.raises(ValueError, match="query must be"):
        compressed_lse(query[0], key, visible)
