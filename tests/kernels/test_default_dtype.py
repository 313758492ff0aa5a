"""Results do not depend on ``torch.set_default_dtype``, which scripts use to make models in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from draftattn.kernels import antidiagonal_mass, split_block_lse
from draftattn.kernels.api import BlockMeans, block_sparse_attention
from draftattn.kernels.block_mask import BlockMask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention(backend: str, dtype: torch.dtype = torch.float32, head_dim: int = 16) -> Iterator[Tensor]:
    """Output, LSE and all gradients of a ragged call with a residual; then the LSE of a call without tokens."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 20, 40, 50], dtype=torch.int32, device=DEVICE)
    block_map = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool, device=DEVICE)[None, None]
    mask = BlockMask.from_block_map(block_map, offsets, offsets, 32)
    tensors = [
        torch.randn(1, length, 2, head_dim, generator=generator, dtype=torch.float32).to(DEVICE, dtype).requires_grad_()
        for length in (50, 50, 50, 3, 3)
    ]
    result = block_sparse_attention(
        *tensors[:3], mask, residual=BlockMeans(*tensors[3:]), return_lse=True, backend=backend
    )
    yield from result
    upstream = [torch.ones_like(x) for x in result]
    yield from torch.autograd.grad(result, tensors, upstream)
    yield block_sparse_attention(*(x[:0] for x in tensors[:3]), mask, return_lse=True, backend=backend)[1]


def of_module(module: Any, function: Callable[..., Tensor], served: bool) -> Callable[[], Iterator[Tensor]]:
    def run() -> Iterator[Tensor]:
        query = torch.linspace(-2, 2, 50 * 2 * 16, dtype=torch.float32, device=DEVICE).sin().view(1, 50, 2, 16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_kernel_serves", lambda *_: served)
            yield function(query, query[:, :, :1])

    return run


CASES = {
    "reference": lambda: attention("reference"),
    "cpu": lambda: attention("cpu"),
    "triton": lambda: attention("triton"),
    "hopper": lambda: attention("hopper", torch.bfloat16, 64),
    "antidiagonal": of_module(antidiagonal_mass, lambda q, k: antidiagonal_mass.antidiagonal_mass(q, k, 16, 4), False),
    "antidiagonal-triton": of_module(
        antidiagonal_mass, lambda q, k: antidiagonal_mass.antidiagonal_mass(q, k, 16, 4), True
    ),
    "split": of_module(split_block_lse, lambda q, k: split_block_lse.split_block_lse(q[:, -9:], k, 16), False),
    "split-triton": of_module(split_block_lse, lambda q, k: split_block_lse.split_block_lse(q[:, -9:], k, 16), True),
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same_under_any_default(name: str) -> None:
    if "triton" in name:
        pytest.importorskip("triton")
    if name == "cpu" and DEVICE.type != "cpu":
        pytest.skip("a backend for CPUs")
    if name == "hopper" and not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9):
        pytest.skip("needs an H100 or H200")
    expected = list(CASES[name]())
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = list(CASES[name]())
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, plain in zip(found, expected, strict=True):
        assert mine.dtype == plain.dtype
        assert torch.equal(mine, plain)
