"""Sums over many tiles, on a GPU: what a tile rounds must not add up."""

from __future__ import annotations

import pytest
import torch

from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.backends import BackendName, reasons_against
from draftattn.kernels.block_mask import BlockMask

HEADS, QUERIES, KEYS, HEAD_DIM = 32, 1024, 32768, 128  # so many rows of blocks that none is split


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_sums_do_not_drift(backend: BackendName) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator)
        for tokens, heads in ((QUERIES, HEADS), (KEYS, 1), (KEYS, 1))
    )
    if reasons := reasons_against(backend, query, key, value):
        pytest.skip("; ".join(reasons))
    rows, columns = (torch.arange(0, n + 1, 128, dtype=torch.int32, device="cuda") for n in (QUERIES, KEYS))
    everything = torch.ones(1, 1, len(rows) - 1, len(columns) - 1, dtype=torch.bool, device="cuda")
    mask = BlockMask.from_block_map(everything, rows, columns, block_size=128)
    _, lse = block_sparse_attention(query, key, value, mask, return_lse=True, backend=backend)
    scores = query[0, :, 0].double() @ key[0, :, 0].double().T * HEAD_DIM**-0.5
    error = lse[0, 0].double() - scores.logsumexp(-1)
    # a step of fp32 at these numbers is 1e-6; a rescaling that is off by one rounding in each of 256 tiles gives 1e-5
    assert error.square().mean().sqrt() < 3e-6
