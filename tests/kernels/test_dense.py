"""Dense attention on a chosen kernel."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from draftattn import DraftConfig, InputError
from draftattn.kernels import dense
from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.dense import DenseBackend, choose_dense, fastest_dense, reasons_against_dense

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(300, 300, 4, 4), (37, 129, 4, 2), (128, 1, 2, 2), (1, 257, 6, 1)]


def tensors(queries: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype, dim: int = 64) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = [(2, queries, heads, dim), (2, keys, kv_heads, dim), (2, keys, kv_heads, dim)]
    return [torch.randn(size, generator=generator, device=DEVICE).to(dtype) for size in sizes]


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """In float64, by the formula."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.double().repeat_interleave(group, dim=2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", get_args(DenseBackend))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [None, 0.3], ids=["usual scale", "own scale"])
def test_every_kernel_computes_dense_attention(
    shape: tuple[int, ...], backend: DenseBackend, dtype: torch.dtype, scale: float | None
) -> None:
    query, key, value = tensors(*shape, dtype)
    reasons = reasons_against_dense(backend, query, key, value)
    if reasons:
        pytest.skip("; ".join(reasons))
    expected = exact(query, key, value, 64**-0.5 if scale is None else scale)
    torchs = fastest_dense(query, key, value, scale, "torch").double() - expected
    ours = fastest_dense(query, key, value, scale, backend)
    assert ours.dtype == dtype
    assert (ours.double() - expected).norm() <= 2 * torchs.norm() + 1e-7 * expected.norm()


@pytest.mark.parametrize("lengths", [(300, 300), (37, 129), (128, 256), (1, 1)], ids=str)
def test_the_mask_of_every_block_leaves_nothing_out(lengths: tuple[int, int]) -> None:
    query, key, value = tensors(*lengths, 4, 2, torch.float32)
    mask = dense._every_block(*lengths, query.device)
    assert float(mask.density) == 1
    output = block_sparse_attention(query, key, value, mask, backend="reference")
    torch.testing.assert_close(output.double(), exact(query, key, value, 64**-0.5), rtol=1e-5, atol=1e-5)
    assert dense._every_block(*lengths, query.device) is mask


def test_short_sequences_and_gradients_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "reasons_against_hopper", lambda *_: [])
    long, short = tensors(4096, 4096, 1, 1, torch.bfloat16), tensors(4096, 512, 1, 1, torch.bfloat16)
    assert choose_dense(*long) == "hopper"
    assert choose_dense(*short) == "torch"
    long[0].requires_grad_()
    assert choose_dense(*long) == "torch"
    with torch.no_grad():
        assert choose_dense(*long) == "hopper"
    with pytest.raises(ValueError, match="gradients"):
        fastest_dense(*long, backend="hopper")


def test_gradients_flow() -> None:
    query, key, value = (x.requires_grad_() for x in tensors(40, 50, 2, 2, torch.float32))
    fastest_dense(query, key, value).square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (query, key, value))


def test_what_cannot_serve_is_refused_with_every_reason() -> None:
    query, key, value = tensors(16, 16, 2, 2, torch.float32, dim=20)
    with pytest.raises(ValueError, match=r"'hopper' cannot serve.*float32 is not fp16.*head_dim 20"):
        fastest_dense(query, key, value, backend="hopper")
    with pytest.raises(ValueError, match="dense_backend is 'dense'; choose from auto, hopper"):
        fastest_dense(query, key, value, backend="dense")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dense_backend is 'dense'; choose from auto, hopper"):
        DraftConfig(dense_backend="dense")  # type: ignore[arg-type]
