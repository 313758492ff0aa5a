"""Every prefill policy against its rule, written as loops over blocks or tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels import antidiagonal_mass as antidiagonal
from draftattn.kernels import smallest_set as smallest
from draftattn.kernels import split_block_lse as split
from draftattn.kernels.antidiagonal_mass import antidiagonal_mass
from draftattn.kernels.backends import triton_interpreted
from draftattn.kernels.smallest_set import smallest_set
from draftattn.pipelines.llm.apply import make_system
from draftattn.pipelines.llm.density import causal_pairs, computed_pairs
from draftattn.pipelines.llm.draft_prefill import (
    DraftPrefillConfig,
    DraftRows,
    blocks_of_layer,
    blocks_of_rows,
)
from draftattn.pipelines.llm.flexprefill import FlexPrefillConfig, FlexPrefillPolicy
from draftattn.pipelines.llm.inputs import CausalInputs, mean_scores
from draftattn.pipelines.llm.system import AttentionCall
from draftattn.pipelines.llm.vertical_slash import VerticalSlashConfig, VerticalSlashPolicy, vertical_slash_mass
from draftattn.pipelines.llm.xattention import XAttentionConfig, XAttentionPolicy
from draftattn.policy import CallContext

BLOCK = 16
SIZES = [(100, 100), (96, 96), (45, 111), (9, 16)]  # queries, keys: cached keys come first
sizes = pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)


def make_inputs(lm: SimpleNamespace, num_queries: int, num_keys: int) -> CausalInputs:
    torch.manual_seed(0)
    query = torch.randn(2, num_queries, 4, 16, device=lm.device)
    key, value = torch.randn(2, 2, num_keys, 2, 16, device=lm.device)
    # neighbours resemble each other, and the first key draws everybody
    query, key = (torch.nn.functional.avg_pool1d(x.transpose(1, 3).flatten(0, 1), 9, 1, 4)
                  .unflatten(0, (2, 16)).transpose(1, 3) * 5 for x in (query, key))  # fmt: skip
    return CausalInputs(query.contiguous(), key.contiguous(), value, BLOCK)


def blocks_of(inputs: CausalInputs) -> list[tuple[int, list[int]]]:
    """Of every row of blocks its own key block and its queries' indices."""
    offset, count = inputs.query_offset, inputs.query.shape[1]
    found: dict[int, list[int]] = {}
    for row in range(count):
        found.setdefault((offset + row) // BLOCK, []).append(row)
    return sorted(found.items())


def head(inputs: CausalInputs, item: int, query_head: int) -> tuple[Tensor, Tensor]:
    group = inputs.query.shape[2] // inputs.key.shape[2]
    return inputs.query[item, :, query_head].double(), inputs.key[item, :, query_head // group].double()


def maps(inputs: CausalInputs, rule: Any) -> Tensor:
    """The map that a rule ``(query, key, rows) -> list of sets`` gives, per item and head."""
    rows = blocks_of(inputs)
    made = torch.zeros(2, 4, len(rows), -(-inputs.key.shape[1] // BLOCK), dtype=torch.bool)
    for item in range(2):
        for query_head in range(4):
            for row, kept in enumerate(rule(*head(inputs, item, query_head), rows)):
                made[item, query_head, row, sorted(kept)] = True
    return made.to(inputs.query.device)


@sizes
@pytest.mark.parametrize("density", [0.3, 0.6])
def test_draft_rows(lm: SimpleNamespace, num_queries: int, num_keys: int, density: float) -> None:
    inputs = make_inputs(lm, num_queries, num_keys)
    mask = DraftRows(DraftPrefillConfig(density=density, block_size=BLOCK, budget="row"))(inputs, CallContext())
    first = inputs.query_offset // BLOCK
    kept_per_row = blocks_of_rows(density, first, mask.num_query_blocks)

    def rule(query: Tensor, key: Tensor, rows: list[tuple[int, list[int]]]) -> list[set[int]]:
        means = [key[i : i + BLOCK].mean(0) for i in range(0, len(key), BLOCK)]
        chosen = []
        for own, queries in rows:
            fit = {b: float(query[queries].mean(0) @ means[b]) for b in range(own + 1)}
            fit[0] = fit[own] = math.inf
            chosen.append(set(sorted(fit, key=lambda b: -fit[b])[:kept_per_row]))
        return chosen

    assert torch.equal(mask.block_map, maps(inputs, rule))
    share = float(computed_pairs(mask, num_queries, num_keys)) / causal_pairs(num_queries, num_keys)
    assert share <= max(density, 0.6 if num_keys < 50 else 0) + 0.05 or kept_per_row <= 2


@sizes
@pytest.mark.parametrize("density", [0.55, 0.7, 1.0])
def test_rows_and_heads_of_a_layer_share_its_budget(
    lm: SimpleNamespace, num_queries: int, num_keys: int, density: float
) -> None:
    inputs = make_inputs(lm, num_queries, num_keys)
    inputs.query[:, :, 1] *= 0.01  # a head that attends broadly
    mask = DraftRows(DraftPrefillConfig(density=density, block_size=BLOCK))(inputs, CallContext())
    rows, first = blocks_of(inputs), inputs.query_offset // BLOCK
    for item in range(2):
        values: list[tuple[float, int, int, int]] = []
        for query_head in range(4):
            query, key = head(inputs, item, query_head)
            means = torch.stack([key[i : i + BLOCK].mean(0) for i in range(0, len(key), BLOCK)])
            for row, (own, queries) in enumerate(rows):
                shares = (means[: own + 1] @ query[queries].mean(0) / 4).softmax(0)
                best = max((float(shares[b]) for b in range(1, own)), default=1.0)
                for block, share in enumerate(shares.tolist()):
                    values.append((math.inf if block in (0, own) else share / best**0.5, query_head, row, block))
        kept = blocks_of_layer(density, first, len(rows), 4, BLOCK)
        expected = torch.zeros_like(mask.block_map[item])
        for _, query_head, row, block in sorted(values, reverse=True)[:kept]:
            expected[query_head, row, block] = True
        assert torch.equal(mask.block_map[item], expected)
        assert torch.equal(mask.kv_num_blocks[item], expected.sum(-1, dtype=torch.int32))
    share = float(computed_pairs(mask, num_queries, num_keys)) / causal_pairs(num_queries, num_keys)
    # a ragged first and last row are off by less than that
    assert share <= density + 0.08 or len(rows) < 3
    broad, others = mask.kv_num_blocks[:, 1], mask.kv_num_blocks[:, 2:]
    if density == 0.55 and len(rows) > 5:
        assert broad.sum() > 1.2 * others.double().sum(-1).mean()


def test_heads_share_in_parts_where_one_kernel_cannot_rank_them_all(
    lm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(lm, 100, 100)
    policy = DraftRows(DraftPrefillConfig(density=0.6, block_size=BLOCK))
    monkeypatch.setattr("draftattn.pipelines.llm.draft_prefill._MOST_SCORES", 4 * 7 * 7)
    whole = policy(inputs, CallContext())  # two heads at a time
    for first in (0, 2):
        query, key = inputs.query[:, :, first : first + 2], inputs.key[:, :, first // 2 :][:, :, :1]
        part = policy(CausalInputs(query, key, key, BLOCK), CallContext())
        assert torch.equal(whole.block_map[:, first : first + 2], part.block_map)


def test_a_layer_keeps_what_the_density_allows() -> None:
    for density in (0.05, 0.1, 0.25, 0.5, 0.9, 1.0):
        for first, rows, heads in ((0, 1, 3), (0, 7, 1), (0, 300, 4), (50, 20, 2)):
            kept = blocks_of_layer(density, first, rows, heads, BLOCK)
            seen = heads * sum(first + row + 1 for row in range(rows))
            forced = heads * sum(min(first + row + 1, 2) for row in range(rows))
            hidden = heads * rows * sum(range(BLOCK)) / BLOCK**2
            assert forced <= kept <= seen
            assert kept == forced or kept - hidden <= density * (seen - hidden) + 1e-6
            assert kept == seen or kept + 1 - hidden > density * (seen - hidden)


def test_the_residual_is_a_key_for_every_skipped_block_of_the_past(lm: SimpleNamespace) -> None:
    inputs = make_inputs(lm, 45, 111)
    system = make_system("draft", density=0.3, block_size=BLOCK, residual=True)
    call = AttentionCall(inputs.query, inputs.key, inputs.value, 0.25, 0, torch.nn.Identity())
    ours, kept = system.attend(call), system.mask_of(call).to_dense(1)  # type: ignore[union-attr]
    for query_head in range(4):
        query, key = head(inputs, 1, query_head)
        value = inputs.value[1, :, query_head // 2].double()
        expected = []
        for row, position in enumerate(range(66, 111)):
            seen = kept[query_head, row, : position + 1].nonzero()[:, 0].tolist()
            keys, values, log_counts = [key[i] for i in seen], [value[i] for i in seen], [0.0] * len(seen)
            for start in range(0, (position + 1) // BLOCK * BLOCK, BLOCK):
                if not kept[query_head, row, start]:
                    keys.append(key[start : start + BLOCK].mean(0))
                    values.append(value[start : start + BLOCK].mean(0))
                    log_counts.append(math.log(BLOCK))
            scores = torch.stack(keys) @ query[row] * 0.25 + torch.tensor(log_counts, device=key.device).double()
            expected.append(scores.softmax(0) @ torch.stack(values))
        assert torch.allclose(ours[1, :, query_head].double(), torch.stack(expected), atol=1e-5)


def test_rows_keep_what_the_density_allows() -> None:
    for density in (0.05, 0.1, 0.25, 0.5, 0.9, 1.0):
        for first, rows in ((0, 1), (0, 7), (0, 300), (50, 20)):
            kept = blocks_of_rows(density, first, rows)
            seen = [first + row + 1 for row in range(rows)]

            def pairs(most: int, seen: list[int] = seen) -> float:
                return sum(min(most, count) - 0.5 for count in seen)

            assert kept <= 2 or pairs(kept) <= density * pairs(seen[-1]) + 1e-6
            assert kept == seen[-1] or pairs(kept + 1) > density * pairs(seen[-1])


@sizes
@pytest.mark.parametrize("stride", [1, 4])
def test_antidiagonal_mass_and_xattention(lm: SimpleNamespace, num_queries: int, num_keys: int, stride: int) -> None:
    inputs = make_inputs(lm, num_queries, num_keys)
    mass = antidiagonal_mass(inputs.query, inputs.key, BLOCK, stride)
    rows = blocks_of(inputs)
    for item, query_head in ((0, 0), (1, 3)):
        query, key = head(inputs, item, query_head)
        # queries at their positions, tokens that are not there are zero
        length = -(-num_keys // stride) * stride
        placed = torch.zeros(2, length, 16, dtype=torch.float64, device=key.device)
        placed[0, num_keys - num_queries : num_keys], placed[1, :num_keys] = query, key
        expected = torch.zeros(len(rows), mass.shape[-1], dtype=torch.float64)
        groups, products = length // stride, (placed[0] @ placed[1].T).tolist()
        for i in range((num_keys - num_queries) // stride, groups):
            sums = [
                sum(products[i * stride + stride - 1 - s][j * stride + s] for s in range(stride)) for j in range(i + 1)
            ]
            for j, share in enumerate((torch.tensor(sums).double() / stride / 4).softmax(0).tolist()):
                expected[i * stride // BLOCK - rows[0][0], j * stride // BLOCK] += share
        assert torch.allclose(mass[item, query_head].double().cpu(), expected, atol=1e-4)

    config = XAttentionConfig(threshold=0.7, stride=stride, block_size=BLOCK)
    mask = XAttentionPolicy(config)(inputs, CallContext())
    if stride == 1:  # the estimate is the attention itself

        def rule(query: Tensor, key: Tensor, rows: list[tuple[int, list[int]]]) -> list[set[int]]:
            chosen = []
            for own, queries in rows:
                held = torch.zeros(own + 1, dtype=torch.float64)
                for i in queries:
                    seen = num_keys - num_queries + i + 1
                    for j, share in enumerate((key[:seen] @ query[i] / 4).softmax(0).tolist()):
                        held[j // BLOCK] += share
                kept = {0, own}
                for b in held.argsort(descending=True).tolist():
                    if held[sorted(kept)].sum() >= 0.7 * held.sum():
                        break
                    kept.add(b)
                chosen.append(kept)
            return chosen

        assert torch.equal(mask.block_map, maps(inputs, rule))


def last_attention(query: Tensor, key: Tensor, count: int) -> list[tuple[int, list[float]]]:
    """Of each of the last queries its position and its exact attention."""
    positions = range(len(key) - min(count, len(query)), len(key))
    return [(p, (key[: p + 1] @ query[p - len(key)] / 4).softmax(0).tolist()) for p in positions]


def line_masses(query: Tensor, key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    columns = -(-len(key) // BLOCK)
    by_key, by_distance = torch.zeros(2, columns, dtype=torch.float64)
    attention = last_attention(query, key, count)
    for position, shares in attention:
        for j, share in enumerate(shares):
            by_key[j // BLOCK] += share / len(attention)
            by_distance[(position - j) // BLOCK] += share / len(attention)
    return by_key, by_distance


def touched(rows: list[tuple[int, list[int]]], columns: set[int], bands: set[int]) -> list[set[int]]:
    """Blocks that hold a pair of tokens in a chosen column, or at a chosen distance (of a whole block)."""
    chosen = []
    for own, _ in rows:
        kept = {b for b in columns if b <= own}
        for i in range(own * BLOCK, (own + 1) * BLOCK):
            kept |= {(i - d) // BLOCK for band in bands for d in range(band * BLOCK, (band + 1) * BLOCK) if d <= i}
        chosen.append(kept)
    return chosen


@sizes
def test_vertical_slash(lm: SimpleNamespace, num_queries: int, num_keys: int) -> None:
    inputs = make_inputs(lm, num_queries, num_keys)
    vertical, slash = vertical_slash_mass(inputs, 20)
    expected = line_masses(*head(inputs, 1, 2), 20)
    for ours, theirs in zip((vertical[1, 2], slash[1, 2]), expected, strict=True):
        assert torch.allclose(ours.double().cpu(), theirs, atol=1e-5)
        assert ours.sum().item() == pytest.approx(1)

    def rule(query: Tensor, key: Tensor, rows: list[tuple[int, list[int]]]) -> list[set[int]]:
        best = []
        for mass in line_masses(query, key, 20):
            mass[0] = math.inf
            best.append(set(mass.argsort(descending=True)[:2].tolist()))
        return touched(rows, *best)

    config = VerticalSlashConfig(vertical_size=20, slash_size=32, last_queries=20, block_size=BLOCK)
    assert torch.equal(VerticalSlashPolicy(config)(inputs, CallContext()).block_map, maps(inputs, rule))


def fewest(mass: list[float], share: float, forced: set[int], min_kept: int = 0) -> set[int]:
    kept = set(forced)
    for b in sorted(range(len(mass)), key=lambda b: -mass[b]):
        if sum(mass[x] for x in kept) >= share * sum(mass) and len(kept) >= min_kept:
            break
        kept.add(b)
    return kept


@sizes
@pytest.mark.parametrize("tau", [0.0, 0.12, 9.0])
def test_flexprefill(lm: SimpleNamespace, num_queries: int, num_keys: int, tau: float) -> None:
    inputs = make_inputs(lm, num_queries, num_keys)
    kinds = []

    def rule(query: Tensor, key: Tensor, rows: list[tuple[int, list[int]]]) -> list[set[int]]:
        means = torch.stack([key[i : i + BLOCK].mean(0) for i in range(0, len(key), BLOCK)])
        by_key, by_distance = line_masses(query, key, BLOCK)
        estimate = (means @ query[-BLOCK:].mean(0) / 4).softmax(0).cpu()
        middle = (by_key + estimate) / 2
        divergence = sum((x * (x / middle).log()).sum() / 2 for x in (by_key, estimate))
        kinds.append(math.sqrt(max(divergence, 0.0)) < tau)
        if kinds[-1]:
            pairs, mass = [], []
            for row, (own, queries) in enumerate(rows):
                shares = (means[: own + 1] @ query[queries].mean(0) / 4).softmax(0).tolist()
                pairs += [(row, b) for b in range(own + 1)]
                mass += shares
            chosen: list[set[int]] = [set() for _ in rows]
            for i in fewest(mass, 0.6, set()):
                chosen[pairs[i][0]].add(pairs[i][1])
        else:
            lines = [fewest(mass.tolist(), 0.6, {0}, 2) for mass in (by_key, by_distance)]
            chosen = touched(rows, *lines)
        return [kept | {0, own} for kept, (own, _) in zip(chosen, rows, strict=True)]

    config = FlexPrefillConfig(gamma=0.6, tau=tau, min_budget=2 * BLOCK, block_size=BLOCK)
    assert torch.equal(FlexPrefillPolicy(config)(inputs, CallContext()).block_map, maps(inputs, rule))
    assert all(kinds) if tau == 9 else not all(kinds) or num_keys < 50


@pytest.mark.parametrize(
    "policy",
    [
        XAttentionPolicy(XAttentionConfig(threshold=0.7, stride=4, block_size=BLOCK)),
        VerticalSlashPolicy(VerticalSlashConfig(vertical_size=20, slash_size=32, last_queries=20, block_size=BLOCK)),
        FlexPrefillPolicy(FlexPrefillConfig(gamma=0.6, tau=0.12, min_budget=2 * BLOCK, block_size=BLOCK)),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_kernels_choose_the_same_blocks(lm: SimpleNamespace, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if lm.device.type == "cpu" and not triton_interpreted():
        pytest.skip("Triton needs a GPU or its interpreter")
    inputs = make_inputs(lm, 45, 111)
    inputs = CausalInputs(inputs.query[1:, :, ::2], inputs.key[1:, :, 1:], inputs.value[1:, :, 1:], BLOCK)
    found = []
    for kernels in (False, True):
        for module in (antidiagonal, smallest, split):
            monkeypatch.setattr(module, "_kernel_serves", lambda *_, kernels=kernels: kernels)
        found.append(policy(inputs, CallContext()).block_map)
    assert torch.equal(*found)


def test_the_smallest_set_counts_what_is_forced() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.0, 1.0, 0.0, 0.0]])
    assert smallest_set(scores, 0.4).tolist() == [[False, True, False, False], [False, True, False, False]]
    forced = torch.tensor([True, False, False, False])
    assert smallest_set(scores, 0.5, forced).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert smallest_set(scores, 1.0).tolist() == [[True] * 4, [False, True, False, False]]
    assert smallest_set(scores, 0.1, min_kept=2).sum(-1).tolist() == [2, 1]


def test_scores_are_those_of_the_means(lm: SimpleNamespace) -> None:
    inputs = make_inputs(lm, 45, 111)
    query, key = head(inputs, 1, 3)
    # the first block of queries begins within a block of keys
    expected = query[:14].mean(0) @ key[32:48].mean(0) * 0.5
    assert mean_scores(inputs, 0.5)[1, 3, 0, 2].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DraftPrefillConfig, {"density": 0.0}, "density is 0.0"),
        (DraftPrefillConfig, {"block_size": 8}, "block_size is 8; it must be 16 to 128"),
        (XAttentionConfig, {"stride": 12}, "stride is 12; it must divide the block size 128"),
        (XAttentionConfig, {"threshold": 1.5}, "threshold is 1.5"),
        (VerticalSlashConfig, {"slash_size": 0}, "slash_size is 0"),
        (FlexPrefillConfig, {"gamma": 0}, "gamma is 0"),
        (FlexPrefillConfig, {"tau": -1}, "tau is -1"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**options)
