from dataclasses import replace
from itertools import combinations, pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from draftattn import DraftConfig, TokenGrid, block_layout, enable
from draftattn.eval.masks import RecordingPolicy
from draftattn.eval.recall import exact_attention, largest_per_head, largest_per_row, measure_recall
from draftattn.eval.recall_probe import RecallProbe, in_layout, probe_run
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.layout import BlockLayout
from draftattn.policies import make_policy
from draftattn.policies.adaspa import AdaSpaConfig
from draftattn.policies.draft import DraftPolicy
from draftattn.policy import CallContext

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = TokenGrid(2, 5, 7)


def inputs(
    text: int = 0, lengths: list[int] | None = None, batch: int = 1, tile: tuple[int, int, int] = (1, 2, 3)
) -> AttentionInputs:
    layout = block_layout(GRID, tile, block_size=16, num_text_tokens=text, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        3 * torch.randn(batch, layout.num_tokens, heads, 32, generator=generator).to(DEVICE) for heads in (4, 2, 2)
    )
    text_lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    return AttentionInputs(query, key, value, layout, text_lengths)


def probabilities(call: AttentionInputs, scale: float) -> Tensor:
    """``[B, H, S, S]`` in float64, written out."""
    key = call.key.double().repeat_interleave(2, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", call.query.double(), key) * scale
    if call.text_lengths is not None:
        valid = call.layout.grid.num_tokens + call.text_lengths
        token = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(token >= valid[:, None, None, None], -torch.inf)
    return scores.softmax(-1)


def blocks(layout: BlockLayout) -> list[slice]:
    edges = layout.offsets.tolist()
    return [slice(start, end) for start, end in pairwise(edges)]


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, None), ({"batch": 2}, 0.3), ({"text": 9, "lengths": [4, 9], "batch": 2}, None)],
    ids=["plain", "batch", "text"],
)
def test_mass_equals_the_sums_written_out(options: dict[str, Any], scale: float | None) -> None:
    call = inputs(**options)
    exact = exact_attention(call, DraftConfig(), scale)
    expected = probabilities(call, 32**-0.5 if scale is None else scale)
    for i, row in enumerate(blocks(call.layout)):
        for j, column in enumerate(blocks(call.layout)):
            mass = expected[:, :, row, column].sum(-1).mean(-1)
            torch.testing.assert_close(exact.mass[:, :, i, j].double(), mass, atol=1e-5, rtol=1e-4)
    value = call.value.double().repeat_interleave(2, dim=2)
    output = torch.einsum("bhqk,bkhd->bqhd", expected, value)
    torch.testing.assert_close(exact.output.double(), output, atol=1e-4, rtol=1e-4)


def random_map(call: AttentionInputs, seed: int = 0) -> Tensor:
    """Uneven rows, one of them empty; text dense."""
    video, total = call.layout.num_video_blocks, call.layout.num_blocks
    block_map = torch.rand(call.query.shape[0], 4, total, total, generator=torch.Generator().manual_seed(seed)) < 0.3
    block_map[:, :, 1] = False
    block_map[..., video:, :] = True
    block_map[..., video:] = True
    return block_map.to(DEVICE)


@pytest.mark.parametrize("text", [0, 9])
def test_recall_is_the_probability_kept(text: int) -> None:
    call = inputs(text=text, batch=2)
    block_map = random_map(call)
    mask = BlockMask.from_block_map(block_map, call.layout.offsets, call.key_offsets, call.layout.block_size)
    found = measure_recall(call, mask, exact_attention(call, DraftConfig()), DraftConfig())
    kept = (probabilities(call, 32**-0.5) * torch.stack([mask.to_dense(item) for item in (0, 1)])).sum(-1)
    kept = kept[..., : GRID.num_tokens]
    assert found["recall"] == pytest.approx(float(kept.mean()), abs=1e-5)
    assert found["recall_per_head"] == pytest.approx(kept.mean((0, 2)).tolist(), abs=1e-5)
    assert found["density"] == pytest.approx(float(mask.density))
    assert found["recall_best_per_head"] >= found["recall_best"] - 1e-6
    assert found["recall_best"] > found["recall"] > 0
    assert found["error_best"] < found["error"]


def test_best_rows_are_the_best_of_all_choices() -> None:
    layout = block_layout(TokenGrid(1, 2, 4), (1, 1, 2), block_size=16)
    mass = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    block_map = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)[None, None]
    best = largest_per_row(mass, block_map, layout)
    assert best.sum(-1).tolist() == block_map.sum(-1).tolist()
    for row in range(4):
        choices = combinations(range(4), int(block_map[0, 0, row].sum()))
        highest = max(float(mass[0, 0, row, list(choice)].sum()) for choice in choices)
        assert float(mass[0, 0, row][best[0, 0, row]].sum()) == pytest.approx(highest)
    whole = largest_per_head(mass, block_map, layout)
    assert int(whole.sum()) == int(block_map.sum())
    assert float(mass[whole].sum()) == pytest.approx(float(mass.flatten().topk(6).values.sum()))


def test_text_stays_as_it_is_in_the_other_masks() -> None:
    call = inputs(text=9)
    block_map, video = random_map(call), call.layout.num_video_blocks
    values = torch.rand(block_map.shape, device=DEVICE)
    for changed in (largest_per_row(values, block_map, call.layout), largest_per_head(values, block_map, call.layout)):
        assert torch.equal(changed[..., video:], block_map[..., video:])
        assert torch.equal(changed[..., video:, :], block_map[..., video:, :])
        assert not torch.equal(changed, block_map)


def test_nothing_skipped_loses_nothing_and_random_keeps_its_share() -> None:
    call = inputs()
    exact = exact_attention(call, DraftConfig())
    full = DraftPolicy(DraftConfig(sparsity=0))(call, CallContext())
    figures = measure_recall(call, full, exact, DraftConfig())
    for name in ("recall", "recall_best", "recall_best_per_head", "recall_random", "density"):
        assert figures[name] == pytest.approx(1)
    assert max(figures[name] for name in figures if name.startswith("error")) < 1e-5
    third = DraftPolicy(DraftConfig(sparsity=2 / 3))(call, CallContext())
    random = [measure_recall(call, third, exact, DraftConfig(), seed=seed)["recall_random"] for seed in range(8)]
    assert sum(random) / 8 == pytest.approx(float(third.density), abs=0.04)


def test_residual_softens_the_error_of_smooth_keys() -> None:
    call = inputs()
    smooth = call.key.clone()
    for block in blocks(call.layout):
        smooth[:, block] = smooth[:, block].mean(1, keepdim=True) + 0.1 * smooth[:, block]
    call = AttentionInputs(call.query, smooth, call.value, call.layout)
    mask = DraftPolicy(DraftConfig(sparsity=0.75))(call, CallContext())
    figures = measure_recall(call, mask, exact_attention(call, DraftConfig()), DraftConfig())
    assert figures["error_residual"] < figures["error"]
    assert figures["error_residual_random"] < figures["error_random"]


def test_another_layout_sees_the_same_attention() -> None:
    call = inputs(text=9, lengths=[5])
    other = block_layout(GRID, (1, 5, 2), block_size=16, num_text_tokens=9, device=DEVICE)
    moved = in_layout(call, other)
    outputs = []
    for one in (call, moved):
        output = exact_attention(one, DraftConfig()).output
        outputs.append(one.layout.from_blocks(output[:, : GRID.num_tokens], 1))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert in_layout(call, call.layout).query is call.query


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_a_run_is_bit_for_bit_the_same_with_the_probe(tiny: ModuleType, family: str) -> None:
    pipe = tiny.wan_pipeline() if family == "wan" else tiny.hunyuan_pipeline()
    config = tiny.config()
    with enable(pipe, config):
        expected = tiny.generate(pipe)
    rows: list[dict[str, Any]] = []
    settings = {"same": config, "other": tiny.config(tile=(1, 2, 7), selection="head", residual=False)}
    probe = RecallProbe(DraftPolicy(config), settings, layers=[0, 2], steps=[1, 3], on_row=rows.append)
    with enable(pipe, config, policy=probe) as handle:
        assert torch.equal(tiny.generate(pipe), expected)
        stats = handle.stats()
    assert {(row["layer"], row["step"]) for row in rows} == {(0, 1), (0, 3), (2, 1), (2, 3)}
    assert {row["setting"] for row in rows} == set(settings)
    looked_at = [call for call in stats.calls if (call.layer, call.step) in {(0, 1), (0, 3), (2, 1), (2, 3)}]
    assert len(looked_at) == len(rows) / 2
    for call in looked_at:
        place = ("same", call.layer, call.step, call.branch)
        (density,) = [
            row["density"] for row in rows if (row["setting"], row["layer"], row["step"], row["branch"]) == place
        ]
        assert density == pytest.approx(call.density, abs=1e-6)


def test_probe_run_measures_along_a_dense_run(tiny: ModuleType) -> None:
    pipe = tiny.wan_pipeline()
    rows: list[dict[str, Any]] = []
    steps: list[None] = []
    settings = {name: tiny.config(sparsity=sparsity) for name, sparsity in (("half", 0.5), ("none", 0.0))}
    probe_run(
        pipe,
        settings,
        seed=0,
        layers=None,
        steps=[1],
        on_row=rows.append,
        on_step=lambda: steps.append(None),
        prompt="a red cup",
        num_inference_steps=2,
        max_sequence_length=12,
        **tiny.SIZE,
    )
    assert len(steps) == 2
    assert {row["layer"] for row in rows} == {0, 1, 2}
    for row in rows:
        if row["setting"] == "none":
            assert row["recall"] == pytest.approx(1)
            assert row["error"] < 1e-4
        else:
            assert row["recall_random"] < row["recall_best"] < 1
    assert not hasattr(pipe, "draft")


def test_a_policy_that_searches_in_the_warmup_is_measured_with_what_it_found(tiny: ModuleType) -> None:
    """The mask of the last dense step serves later ones; without a warm-up the step looked at is searched itself."""
    pipe = tiny.wan_pipeline()
    rows: list[dict[str, Any]] = []
    config = tiny.config(policy=AdaSpaConfig(search_every=1.0, high_recall=1.0))
    settings = {"reused": replace(config, warmup=1), "searched": config, "oracle": replace(config, policy="oracle")}
    probe_run(
        pipe,
        settings,
        seed=0,
        layers=[0, 2],
        steps=[3],
        on_row=rows.append,
        bounds=False,
        prompt="a red cup",
        num_inference_steps=4,
        max_sequence_length=12,
        **tiny.SIZE,
    )
    assert not any("best" in key or "random" in key for row in rows for key in row)
    recall = {
        name: [row["recall"] for row in rows if row["setting"] == name and row["branch"] == "cond"] for name in settings
    }
    assert len(recall["oracle"]) == 2
    assert recall["searched"] == pytest.approx(recall["oracle"])
    assert all(reused < best - 1e-4 for reused, best in zip(recall["reused"], recall["oracle"], strict=True))


def test_a_probe_hands_dense_calls_on(tiny: ModuleType) -> None:
    pipe = tiny.wan_pipeline()
    config = tiny.config(policy="adaspa", warmup=2)
    with enable(pipe, config):
        expected = tiny.generate(pipe)
    probe = RecallProbe(make_policy(config), {"same": config}, layers=[0], steps=[3], on_row=lambda row: None)
    recorder = RecordingPolicy(probe, layers=[1], steps=[2], heads=[0])
    with enable(pipe, config, policy=recorder):
        assert torch.equal(tiny.generate(pipe), expected)
    assert len(recorder.records) == 1
