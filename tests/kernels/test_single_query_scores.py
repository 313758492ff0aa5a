"""Scores of key blocks for one query, against sums over pairs written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from draftattn.kernels import single_query_scores
from draftattn.kernels.backends import triton_interpreted
from draftattn.kernels.single_query_scores import single_query_block_scores, single_query_block_scores_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# strides of a block and of a compressed key, compressed keys, blocks, query heads, key heads, head_dim
SHAPES = [
    (4, 2, 611, 153, 24, 1, 16), (4, 2, 37, 10, 6, 2, 80), (1, 1, 9, 9, 2, 2, 32), (2, 3, 70, 40, 20, 1, 16),
    (8, 1, 5, 1, 3, 3, 16), (4, 2, 0, 3, 4, 2, 16),
]  # fmt: skip


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function, through either implementation."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not (DEVICE.type == "cuda" or triton_interpreted()):
            pytest.skip("Triton needs a GPU or its interpreter")
    monkeypatch.setattr(single_query_scores, "_kernel_serves", lambda query, key: request.param == "triton")


def case(
    count: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A query, strided, and keys with NaN behind them."""
    generator = torch.Generator().manual_seed(heads * 1000 + count)
    query = torch.randn(2, heads, 3, head_dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)[:, 2:]
    key = torch.randn(2, count + 5, kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    key[:, count:] = torch.nan
    return 2 * query, key[:, :count]


def exact(
    query: Tensor,
    key: Tensor,
    num_blocks: int,
    block_width: int,
    key_width: int,
    scale: float,
    initial: int,
    local: int,
) -> Tensor:
    """Every compressed key and every block, one after the other."""
    grouped = query[:, 0].double().unflatten(1, (key.shape[2], -1))
    shares = (torch.einsum("bhgd,bchd->bhgc", grouped, key.double()) * scale).softmax(-1).sum(2)
    scores = shares.new_zeros(*shares.shape[:2], 1, num_blocks)
    for block in range(num_blocks):
        for c in range(key.shape[1]):
            if c < (block + 1) * block_width and c + key_width > block * block_width:
                scores[..., 0, block] = torch.maximum(scores[..., 0, block], shares[..., c])
        if block < initial or block >= num_blocks - local:
            scores[..., block] = torch.inf
    return scores


@pytest.mark.usefixtures("implementation", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_sums_over_pairs(shape: tuple[int, int, int, int, int, int, int], dtype: torch.dtype) -> None:
    block_width, key_width, count, num_blocks, *sizes = shape
    query, key = case(count, *sizes, dtype=dtype)
    for initial, local in ((0, 1), (1, 2)):
        rule = (block_width, key_width, 0.4, initial, local)
        expected = exact(query, key, num_blocks, *rule)
        torchs = single_query_block_scores_reference(query, key, num_blocks, *rule)
        scores = single_query_block_scores(
            query, key, num_blocks, block_width=block_width, key_width=key_width, scale=0.4, initial=initial,
            local=local,
        )  # fmt: skip
        assert scores.dtype == torch.float32
        forced = expected == torch.inf
        assert torch.equal(scores == torch.inf, forced)
        error, torchs_error = ((x - expected).masked_fill(forced, 0.0).abs().max() for x in (scores, torchs))
        assert error <= 2 * torchs_error + 1e-6  # a GPU approximates exp2 and log2


@pytest.mark.usefixtures("implementation")
def test_blocks_that_share_their_best_window_score_the_same() -> None:
    """Else which of them is chosen would be chance, for of equal scores the first block wins."""
    query, key = case(611, 8, 2, 16)
    scores = single_query_block_scores(query, key, 153, block_width=4, key_width=2, local=1)[:, :, 0]
    shared = torch.zeros_like(scores, dtype=torch.bool)
    expected = exact(query, key, 153, 4, 2, 16**-0.5, 1, 1)[:, :, 0]
    shared[..., 1:-1] = expected[..., 1:-1] == expected[..., 2:]
    assert shared.sum() > 50
    after = shared.roll(1, -1)
    assert torch.equal(scores[shared], scores[after])


@pytest.mark.usefixtures("implementation")
def test_large_scores_do_not_overflow() -> None:
    query, key = case(37, 6, 2, 16)
    scores = single_query_block_scores(300 * query, key, 10, block_width=4, key_width=2, scale=-1.0)
    torch.testing.assert_close(scores.double(), exact(300 * query, key, 10, 4, 2, -1.0, 1, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("implementation")
def test_scores_are_float32_whatever_the_default() -> None:
    query, key = case(37, 6, 2, 16)
    expected = single_query_block_scores(query, key, 10, block_width=4, key_width=2)
    torch.set_default_dtype(torch.float16)
    try:
        scores = single_query_block_scores(query, key, 10, block_width=4, key_width=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


def test_bad_input_is_refused() -> None:
    query, key = case(37, 6, 2, 16)
    widths = dict(block_width=4, key_width=2)
    with pytest.raises(ValueError, match="not one query"):
        single_query_block_scores(query.expand(-1, 2, -1, -1), key, 10, **widths)
    with pytest.raises(ValueError, match="not one query"):
        single_query_block_scores(query[:, :, :5], key, 10, **widths)
    with pytest.raises(ValueError, match="key must be"):
        single_query_block_scores(query, key[0], 10, **widths)
    with pytest.raises(ValueError, match="at least 1"):
        single_query_block_scores(query, key, 0, **widths)


def test_it_compiles_without_spills(compile_ahead: Callable[[str, list[str]], list[dict[str, Any]]]) -> None:
    pytest.importorskip("triton")
    jobs = ["logits:90:bf16:128", "logits:86:fp32:256", "maxima:90:bf16:128"]
    for kernel in compile_ahead("compile_single_query.py", jobs):
        assert kernel["stack_bytes"] == 0, kernel
        # two programs of a multiprocessor, on every GPU
        assert kernel["shared_kb"] <= 49, kernel
