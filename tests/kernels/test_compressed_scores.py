"""Scores of key blocks from compressed keys, against sums over pairs written out."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from draftattn.kernels import compressed_scores
from draftattn.kernels.backends import triton_interpreted
from draftattn.kernels.compressed_scores import AlwaysChosen, compressed_block_scores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_QUERIES = 13
# strides of a block and of a compressed key, compressed keys, blocks, query heads, key heads
SHAPES = [
    (4, 2, 37, 10, 6, 2), (1, 1, 9, 9, 2, 2), (2, 3, 20, 11, 6, 2), (8, 1, 5, 1, 16, 1), (4, 2, 0, 3, 4, 2),
    (2, 2, 95, 61, 6, 2),  # so many blocks that programs share them
]  # fmt: skip


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The public function, through either implementation."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if not (DEVICE.type == "cuda" or triton_interpreted()):
            pytest.skip("Triton needs a GPU or its interpreter")
    monkeypatch.setattr(compressed_scores, "_kernel_serves", lambda query, key: request.param == "triton")
    return request.param


def case(heads: int, kv_heads: int, count: int, dim: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, key, LSE and visible counts, and the probabilities of the group in float64, ``[B, H_kv, T, C]``."""
    generator = torch.Generator().manual_seed(heads * 100 + count)
    query = torch.randn(2, NUM_QUERIES, heads, dim, generator=generator).to(DEVICE)
    key = torch.randn(2, count, kv_heads, dim, generator=generator).to(DEVICE)
    visible = torch.randint(0, count + 1, (NUM_QUERIES,), generator=generator, dtype=torch.int32)
    visible[:3] = torch.tensor([0, min(1, count), count])
    visible = visible.sort().values.to(DEVICE)
    logits = torch.einsum("bthgd,bchd->bhgtc", query.double().unflatten(2, (kv_heads, -1)), key.double()) * 0.2
    seen = torch.arange(count, device=DEVICE) < visible[:, None]
    lse = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    pivot = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = (logits - pivot[..., None]).exp().masked_fill(~seen, 0.0).sum(2)
    return query, key, lse.flatten(1, 2).float(), visible, weights


@pytest.mark.parametrize("reduce", ["overlap", "max"])
@pytest.mark.parametrize(("block_width", "key_width", "count", "num_blocks", "heads", "kv_heads"), SHAPES)
def test_equals_sums_over_pairs(
    implementation: str, reduce: Literal["overlap", "max"], block_width: int, key_width: int, count: int,
    num_blocks: int, heads: int, kv_heads: int,
) -> None:  # fmt: skip
    query, key, lse, visible, weights = case(heads, kv_heads, count)
    exact = weights.new_zeros(2, kv_heads, NUM_QUERIES, num_blocks)
    for block in range(num_blocks):
        for c in range(count):
            shared = min(c + key_width, (block + 1) * block_width) - max(c, block * block_width)
            if shared > 0 and reduce == "overlap":
                exact[..., block] += shared * weights[..., c]
            elif shared > 0:
                exact[..., block] = torch.maximum(exact[..., block], weights[..., c])
    widths = dict(block_width=block_width, key_width=key_width)
    scores = compressed_block_scores(query, key, lse, visible, num_blocks, **widths, scale=0.2, reduce=reduce)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=2e-5, atol=1e-6)

    own = (torch.arange(NUM_QUERIES, device=DEVICE) * num_blocks // NUM_QUERIES).int()
    always = AlwaysChosen(own, initial=1, local=2)
    scores = compressed_block_scores(
        query, key, lse, visible, num_blocks, **widths, scale=0.2, reduce=reduce, always=always
    )
    block, own = torch.arange(num_blocks, device=DEVICE), own[:, None]
    exact = exact.masked_fill((block == 0) | (block >= own - 1), torch.inf).masked_fill(block > own, -torch.inf)
    torch.testing.assert_close(scores.double(), exact, rtol=2e-5, atol=1e-6)


def test_strides_are_honoured(implementation: str) -> None:
    query, key, lse, visible, _ = case(6, 2, 37)
    arguments = (visible, 10)
    expected = compressed_block_scores(query, key, lse, *arguments, block_width=4, key_width=2)
    query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(compressed_block_scores(query, key, lse, *arguments, block_width=4, key_width=2), expected)


def test_bad_input_is_refused() -> None:
    query, key, lse, visible, _ = case(6, 2, 37)
    with pytest.raises(ValueError, match="visible must be int32"):
        compressed_block_scores(query, key, lse, visible.long(), 10, block_width=4, key_width=2)
    with pytest.raises(ValueError, match="lse must be"):
        compressed_block_scores(query, key, lse[:, :3], visible, 10, block_width=4, key_width=2)
    with pytest.raises(ValueError, match="do not fit together"):
        compressed_block_scores(query[:, :, :5], key, lse, visible, 10, block_width=4, key_width=2)
    with pytest.raises(ValueError, match="at least 1"):
        compressed_block_scores(query, key, lse, visible, 10, block_width=0, key_width=2)
    with pytest.raises(ValueError, match="choose overlap or max"):
        compressed_block_scores(query, key, lse, visible, 10, block_width=4, key_width=2, reduce="mean")  # type: ignore[arg-type]
