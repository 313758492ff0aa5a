import sys
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from draftattn.kernels import fa4
from draftattn.kernels.block_mask import BlockMask, SlidingWindow

pytestmark = pytest.mark.usefixtures("poisoned_memory")
served_here = pytest.mark.skipif(bool(fa4.reasons_against_platform()), reason="needs a GPU and flash-attn-4")

EVEN = [
    dict(query_blocks=(128,) * 5),
    dict(query_blocks=(128,) * 4 + (50,), mask_heads=4, heads=4, lse=True),
    dict(query_blocks=(128,) * 4 + (50,), heads=4, kv_heads=2, mask_heads=2, batch=2, mask_batch=2, lse=True),
    dict(query_blocks=(128,) * 4 + (50,), heads=4, kv_heads=2, mask_heads=4, causal=True, lse=True),
    dict(query_blocks=(128, 128), key_blocks=(128,) * 3 + (37,), causal=True, lse=True, density=2.0),
    dict(query_blocks=(128,) * 3 + (37,), key_blocks=(128, 128), causal=True, lse=True, density=2.0),
]


def name_of(options):
    return "-".join(f"{name}{value}" for name, value in options.items() if name != "query_blocks") or "plain"


@pytest.mark.gpu
@served_here
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("options", EVEN, ids=name_of)
def test_against_float64(make_case, judge, options, head_dim):
    case = make_case(**dict(block_size=128, head_dim=head_dim, dtype=torch.bfloat16) | options)
    assert not fa4.reasons_against_fa4(case.query, case.key, case.value, None, case.mask)
    result = fa4.attention_forward(
        case.query, case.key, case.value, case.mask,
        scale=head_dim**-0.5, causal=case.spec.causal, residual=None, return_lse=case.spec.lse,
    )  # fmt: skip
    judge(case, *result)


@pytest.mark.gpu
@served_here
def test_dense(make_case, judge):
    case = make_case(query_blocks=(128,) * 5, density=2.0, empty_row=False, head_dim=128, dtype=torch.bfloat16)
    options = dict(scale=128**-0.5, causal=False, return_lse=False)
    judge(case, *fa4.tile_attention(case.query, case.key, case.value, None, **options))


class StandInTensors(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


def stand_in(query, key, value, softmax_scale, return_lse, block_sparse_tensors, pack_gqa, mask_mod=None):
    """What flash-attn-4 documents, in plain torch: tiles of two lists, a rule for the pairs of one of them."""
    assert not pack_gqa
    lists = block_sparse_tensors
    assert lists.block_size == (128, 128)
    batch, query_length, heads, _ = query.shape
    key_length = key.shape[1]
    seen = torch.zeros(batch, heads, query_length, key_length, dtype=torch.bool)
    i, j = torch.arange(query_length)[:, None], torch.arange(key_length)
    rule = torch.ones(query_length, key_length, dtype=torch.bool) if mask_mod is None else mask_mod(i, j)
    for counts, ids, allowed in (
        (lists.full_block_cnt, lists.full_block_idx, torch.ones_like(rule)),
        (lists.mask_block_cnt, lists.mask_block_idx, rule),
    ):
        assert counts.shape[1] in (1, heads)
        counts, ids = counts.expand(batch, heads, -1), ids.expand(batch, heads, -1, -1)
        for b in range(batch):
            for h in range(heads):
                for row, count in enumerate(counts[b, h].tolist()):
                    for column in ids[b, h, row, :count].tolist():
                        tile = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
                        assert not seen[b, h][tile].any(), "a tile is listed twice"
                        seen[b, h][tile] = allowed[tile]
    key, value = (x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2).double() for x in (key, value))
    scores = (query.transpose(1, 2).double() @ key.mT * softmax_scale).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return (weights @ value).transpose(1, 2).to(query.dtype), lse.float() if return_lse else None


@pytest.mark.parametrize("options", EVEN, ids=name_of)
def test_lists_hold_the_chosen_pairs(make_case, judge, monkeypatch, options):
    case = make_case(**dict(block_size=128) | options)
    case = case.to(torch.float32, "cpu")
    shift = case.key.shape[1] - case.query.shape[1]
    package, cute, block_sparsity = (ModuleType(f"flash_attn{end}") for end in ("", ".cute", ".cute.block_sparsity"))
    cute.flash_attn_func = stand_in
    block_sparsity.BlockSparseTensorsTorch = StandInTensors
    for module in (package, cute, block_sparsity):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fa4, "_causal_rule", lambda: lambda i, j: j <= i + shift)
    result = fa4.attention_forward(
        case.query, case.key, case.value, case.mask,
        scale=32**-0.5, causal=case.spec.causal, residual=None, return_lse=case.spec.lse,
    )  # fmt: skip
    judge(case, *result)


def test_every_reason_is_named():
    query = torch.zeros(1, 300, 2, 80, requires_grad=True)
    offsets = torch.tensor([0, 100, 200, 300], dtype=torch.int32)
    block_map = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask = BlockMask.from_block_map(block_map, offsets, offsets)
    reasons = " ".join(fa4.reasons_against_fa4(query, query, query.expand(2, -1, -1, -1).mT.mT, (query, query), mask))
    for word in (
        "tensors are on cpu",
        "float32",
        "head_dim 80",
        "no backward",
        "no residual",
        "query blocks",
        "key bl",
    ):
        assert word in reasons
    if fa4.installed_version() is None:
        assert "pip install --pre flash-attn-4" in reasons
    windowed = BlockMask(mask.kv_num_blocks, mask.kv_indices, offsets, offsets, window=SlidingWindow(64))
    assert "no sliding window" in " ".join(fa4.reasons_against_fa4(query, query, query, None, windowed))


def test_even_blocks_are_no_reason():
    query = torch.zeros(1, 300, 2, 128, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 128, 256, 300], dtype=torch.int32)
    mask = BlockMask.from_block_map(torch.ones(1, 1, 3, 3, dtype=torch.bool), offsets, offsets)
    assert fa4.reasons_against_fa4(query, query, query, None, mask) == fa4.reasons_against_fa4(query, query, query)
