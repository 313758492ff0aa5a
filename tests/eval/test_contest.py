"""The contest of policies, on a random model of a few thousand parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from draftattn import DraftConfig
from draftattn.errors import InputError
from draftattn.eval import contest as contest_module
from draftattn.eval import contest_calls
from draftattn.eval.contenders import DEFAULT_CONTENDERS, read_contenders
from draftattn.eval.contest import Contest, measure_contest, write_contest
from draftattn.eval.contest_calls import capture_calls, match_density, mean_density, seconds_of
from draftattn.eval.contest_tables import at_equal_time, within_time
from draftattn.eval.plot_contest import plot_contest
from draftattn.eval.run_study import run_study
from draftattn.eval.study import Study, StudyFolder
from draftattn.policies import POLICY_NAMES, policy_text
from draftattn.policies.sparge import SpargeConfig
from draftattn.policies.xattention import XAttentionConfig

CPU = torch.device("cpu")
BASE = DraftConfig(tile=(1, 2, 2))
SIZE = {"height": 64, "width": 64, "num_frames": 5}  # 2×4×4 tokens in 8 blocks of 4


@pytest.fixture(scope="module")
def pipe(tiny: ModuleType) -> Any:
    return tiny.wan_pipeline()


@pytest.fixture(scope="module")
def calls(pipe: Any) -> list[contest_calls.CapturedCall]:
    arguments = {"prompt": "a dog", "num_inference_steps": 3, "guidance_scale": 3.0, **SIZE}
    return capture_calls(pipe, [0, 2], [1, 2], seed=0, **arguments)


def contest(text: str = "published,draft,adaspa", **changes: Any) -> Contest:
    study = Study(
        model="tiny",
        prompts=("a dog",),
        seeds=(3,),
        settings={},
        **SIZE,
        num_steps=3,
        guidance=1.0,
        dtype="float32",
    )
    settings: dict[str, Any] = {
        "contenders": read_contenders(text, BASE),
        "densities": (0.5, 0.25),
        "warmups": (0.0, 0.4),
        "study": study,
        "layers": (0, 2),
        "steps": (2,),
        "recall_prompts": 1,
    }
    return Contest(**(settings | changes))


def run_contest(what: Contest, path: Path, load: Callable[[], Any]) -> dict[str, Any]:
    study = measure_contest(what, path, load, CPU)
    run_study(StudyFolder.open(path / "study", study, CPU), study, load, CPU, keep_videos=False)
    return write_contest(what, path, CPU)


def refuse_to_load() -> Any:
    raise AssertionError("nothing was left to do")


@pytest.fixture(scope="module")
def finished(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("contest") / "contest"
    return path, run_contest(contest(), path, lambda: pipe)


class TestContenders:
    def test_all_policies_take_part_and_only_ours_has_the_residual(self) -> None:
        found = read_contenders(DEFAULT_CONTENDERS, BASE)
        assert [name for name in found if name != "published"] == list(POLICY_NAMES)
        assert [name for name, config in found.items() if config.residual] == ["draft"]
        published = found["published"]
        assert (published.policy, published.selection, published.residual) == ("draft", "head", False)
        assert found["draft"] == BASE
        assert all(config.tile == BASE.tile for config in found.values())

    def test_the_residual_can_be_added_and_taken_away(self) -> None:
        found = read_contenders("svg+residual, draft+plain, xattention:mass=0.5+residual", BASE)
        assert [config.residual for config in found.values()] == [True, False, True]
        assert policy_text(found["xattention:mass=0.5+residual"].policy) == "xattention:mass=0.5"

    def test_tiles_are_the_published_ones_unless_one_is_given(self) -> None:
        found = read_contenders("published,draft,svg,carve,carve+frame,sliding_tile:queries=8", DraftConfig())
        tiles = ["frame", DraftConfig().tile, "frame", "space-time", "frame", "space-time"]
        assert [config.tile for config in found.values()] == tiles

    @pytest.mark.parametrize("text", ["svgg", "svg+more"])
    def test_what_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(InputError, match=text.partition("+")[0]):
            read_contenders(text, BASE)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"densities": (0.0,)}, "densities holds 0.0"),
            ({"warmups": (1.0,)}, "warmups holds 1.0"),
            ({"warmups": ()}, "at least one"),
            ({"recall_prompts": 0}, "recall-prompts is 0"),
        ],
    )
    def test_a_contest_checks_itself(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            contest(**changes)


class TestCalls:
    def test_captured_are_the_calls_asked_for(self, calls: list[contest_calls.CapturedCall]) -> None:
        assert [(call.context.layer, call.context.step) for call in calls] == [(0, 1), (2, 1), (0, 2), (2, 2)]
        assert all(call.context.branch == "cond" for call in calls)
        moved = calls[0].fresh(BASE)
        assert moved.layout.tile == BASE.tile
        there = calls[0].inputs
        for one, other in ((moved.query, there.query), (moved.value, there.value)):
            assert torch.equal(moved.layout.from_blocks(one, 1), there.layout.from_blocks(other, 1))

    @pytest.mark.parametrize("density", [0.25, 0.5])
    @pytest.mark.parametrize("name", ["xattention", "sparge:similarity=-1", "carve:neighbours=no"])
    def test_rules_by_mass_are_bisected_to_the_density(
        self, calls: list[contest_calls.CapturedCall], name: str, density: float
    ) -> None:
        config = read_contenders(name, BASE)[name]
        matched = match_density(config, density, calls)
        assert mean_density(matched, calls) == pytest.approx(density, abs=0.05)
        assert replace(matched, sparsity=config.sparsity, policy=config.policy) == config

    @pytest.mark.parametrize("name", ["draft", "adaspa", "oracle", "random"])
    def test_budgets_are_taken_as_they_are(self, calls: list[contest_calls.CapturedCall], name: str) -> None:
        assert match_density(read_contenders(name, BASE)[name], 0.25, calls).sparsity == 0.75

    def test_budgets_of_ragged_blocks_are_bisected(self, calls: list[contest_calls.CapturedCall]) -> None:
        """Large blocks hold more of the attention, so that the budget of blocks is more than that of scores."""
        ragged = replace(BASE, tile=(1, 3, 3), policy="oracle")
        plain = mean_density(replace(ragged, sparsity=0.5), calls)
        matched = mean_density(match_density(ragged, 0.5, calls), calls)
        assert abs(matched - 0.5) <= abs(plain - 0.5)

    def test_of_all_values_tried_the_nearest_is_taken(self, calls: list[contest_calls.CapturedCall]) -> None:
        """Neighbours alone exceed the density: nothing comes nearer than none of the rest."""
        config = read_contenders("carve:mass=0", BASE)["carve:mass=0"]
        least = mean_density(replace(config, sparsity=0.999), calls)
        assert least > 0.3
        matched = match_density(config, 0.1, calls)
        assert mean_density(matched, calls) == pytest.approx(least)

    def test_time_covers_every_step_once(
        self, calls: list[contest_calls.CapturedCall], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A clock that counts calls finds one for each sparse step, and more for one that watches dense steps."""
        taken: list[float] = []

        def one_second(call: Any, device: torch.device) -> Any:
            call()
            taken.append(1.0)
            return lambda: 1.0

        monkeypatch.setattr(contest_calls, "_timed", one_second)
        warm = replace(BASE, warmup=2)
        assert seconds_of(warm, calls, 6, CPU) == 1.0
        assert len(taken) == (1 + 2 * 2) * 4  # untimed for the first layer, then twice for both
        taken.clear()
        assert seconds_of(replace(warm, policy="adaspa"), calls, 6, CPU) == 1.5
        assert seconds_of(None, calls, 6, CPU) == 1.0

    def test_nothing_pooled_is_reused_between_steps(
        self, calls: list[contest_calls.CapturedCall], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from draftattn import inputs

        pooled: list[int] = []
        original = inputs.pool_together

        def noted(requests: Any, block_size: int) -> Any:
            pooled.append(len(requests))
            return original(requests, block_size)

        monkeypatch.setattr(inputs, "pool_together", noted)
        seconds_of(BASE, calls[:1], 4, CPU)
        assert len(pooled) == 3 * 3  # three of four steps are sparse; untimed, then twice


class TestEqualTime:
    def test_between_points_the_value_is_linear_in_the_logarithm_of_time(self) -> None:
        points = [(1.0, 10.0), (4.0, 20.0), (16.0, 22.0)]
        assert within_time(points, 8.0, True) == pytest.approx(21.0)
        assert within_time(points, 4.0, True) == 20.0
        assert within_time(points, 100.0, True) == 22.0
        assert within_time(points, 0.99, True) is None

    def test_the_best_counts_where_a_longer_time_is_worse(self) -> None:
        points = [(4.0, 20.0), (2.0, 25.0), (8.0, 24.0)]
        assert within_time(points, 5.0, True) == 25.0
        assert within_time(points, 2.0, True) == 25.0
        lower = within_time([(4.0, 0.2), (2.0, 0.5)], 3.0, False)
        assert lower == pytest.approx(0.5 - 0.3 * math.log(1.5) / math.log(2), abs=1e-5)

    def test_every_contender_meets_the_times_of_the_first(self) -> None:
        def row(name: str, density: float, seconds: float, psnr: float | None) -> dict[str, Any]:
            return {
                "contender": name,
                "warmup": 0,
                "target_density": density,
                "density": density,
                "seconds": seconds,
                "psnr": psnr,
            }

        rows = [row("a", 0.5, 4.0, 20.0), row("a", 0.1, 1.0, 10.0), row("b", 0.5, 8.0, 30.0), row("b", 0.1, 2.0, 20.0)]
        rows += [row("c", 0.5, 2.0, None), row("c", 0.1, 1.0, 15.0)]
        found = at_equal_time(rows, ["a", "b", "c"])
        values = {(entry["contender"], entry["target_density"]): entry["psnr"] for entry in found}
        assert values == {
            ("a", 0.5): 20.0,
            ("a", 0.1): 10.0,
            ("b", 0.5): 25.0,
            ("b", 0.1): None,
            ("c", 0.5): None,  # identical videos
            ("c", 0.1): 15.0,
        }


class TestWhole:
    def test_it_measures_every_contender_density_and_warmup(self, finished: tuple[Path, dict[str, Any]]) -> None:
        path, result = finished
        assert json.loads((path / "contest.json").read_text()) == result
        rows = result["rows"]
        keys = {(row["contender"], row["target_density"], row["warmup"]) for row in rows}
        names = ("published", "draft", "adaspa")
        assert len(rows) == len(keys) == 3 * 2 * 2
        assert {key[0] for key in keys} == set(names)
        for row in rows:
            assert row["videos"] == 1
            # of 8 blocks, and every step rounds up
            assert row["density"] == pytest.approx(row["target_density"], abs=0.1)
            assert 0 < row["recall"] < 1
            assert row["error"] > 0
            assert row["seconds"] > 0
            assert row["psnr"] > 0
        by_key = {(row["contender"], row["target_density"], row["warmup"]): row for row in rows}
        for name in ("published", "draft"):
            assert by_key[name, 0.5, 0.0]["recall"] > by_key[name, 0.25, 0.0]["recall"]
            assert by_key[name, 0.5, 0.0]["psnr"] > by_key[name, 0.25, 0.0]["psnr"]
        # what the warm-up cannot change is measured once
        assert by_key["published", 0.5, 0.0]["seconds"] == by_key["published", 0.5, 0.4]["seconds"]
        assert by_key["draft", 0.5, 0.0]["error"] < by_key["published", 0.5, 0.0]["error"]
        assert len(result["equal_time"]) == 3 * 2 * 2
        own = [entry for entry in result["equal_time"] if entry["contender"] == "published"]
        assert all(entry["psnr"] is not None for entry in own)
        assert not (path / "study" / "videos").exists() or not list((path / "study" / "videos").iterdir())

    def test_the_same_command_again_does_nothing_anew(self, finished: tuple[Path, dict[str, Any]]) -> None:
        path, result = finished
        assert run_contest(contest(), path, refuse_to_load) == result

    def test_a_stopped_contest_continues(
        self, finished: tuple[Path, dict[str, Any]], pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small = contest("published,adaspa", densities=(0.5,), warmups=(0.0,))
        with monkeypatch.context() as stopped:
            stopped.setattr(contest_module, "probe_run", lambda *arguments, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_contest(small, tmp_path / "c", lambda: pipe)
        kept = json.loads((tmp_path / "c" / "measured.json").read_text())["parameters"]
        assert len(kept) == 2
        again = run_contest(small, tmp_path / "c", lambda: pipe)
        assert json.loads((tmp_path / "c" / "measured.json").read_text())["parameters"] == kept
        whole = finished[1]
        for row in again["rows"]:
            (same,) = [
                x for x in whole["rows"] if all(x[key] == row[key] for key in ("contender", "target_density", "warmup"))
            ]
            for key in ("density", "recall", "error", "psnr", "lpips"):
                if key in row:
                    assert row[key] == pytest.approx(same[key], rel=1e-3)

    def test_another_contest_needs_another_folder(self, finished: tuple[Path, dict[str, Any]]) -> None:
        with pytest.raises(InputError, match=r"another layers, steps; use another folder"):
            run_contest(contest(layers=(1,), steps=(1,)), finished[0], refuse_to_load)

    def test_a_larger_video_is_timed_at_the_densities_of_the_small_one(self, pipe: Any, tmp_path: Path) -> None:
        larger = contest("draft,sparge:similarity=-1", densities=(0.4,), warmups=(0.0,), time_size=(64, 80, 17))
        result = run_contest(larger, tmp_path / "c", lambda: pipe)
        assert all(row["large_seconds"] > 0 for row in result["rows"])
        assert result["dense_large_seconds"] > 0
        assert [entry["time"] for entry in result["equal_time"]] == ["seconds"] * 2 + ["large_seconds"] * 2
        plot_contest(result, tmp_path / "plot.svg")
        assert (tmp_path / "plot.svg").stat().st_size > 1000

    def test_the_picture_names_every_contender(self, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        file = tmp_path / "plot.svg"
        plot_contest(finished[1], file)
        text = file.read_text()
        for name in ("published", "draft", "adaspa", "PSNR", "warm"):
            assert f"<!-- {name}" in text
        with pytest.raises(InputError, match="nothing to draw"):
            plot_contest(finished[1] | {"rows": []}, file)


def test_settings_of_a_mass_rule_are_named_by_what_was_matched() -> None:
    from draftattn.eval.settings import setting_name

    names = {setting_name(replace(BASE, policy=XAttentionConfig(mass=mass))) for mass in (0.8123, 0.8124)}
    assert len(names) == 2
    assert setting_name(replace(BASE, policy=SpargeConfig(similarity=-1.0))).count("-") == 4
