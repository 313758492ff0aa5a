"""``--policy`` and ``draftattn bench policies``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from draftattn.cli import grid, main, options

TINY_WAN = str(Path(__file__).parents[2] / "assets" / "tiny-wan")
SMALL = ["--height", "64", "--width", "96", "--frames", "5", "--steps", "2", "--guidance", "1", "--tile", "1x2x3"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["draftattn", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code if isinstance(stop.value.code, int) else 0


def test_options_become_policies() -> None:
    nothing: list[Any] = [None] * 8
    assert options.draft_config(*nothing).policy == "draft"
    assert options.draft_config(*nothing, "svg").policy == "svg"
    config: Any = options.draft_config(*nothing, "xattention:mass=0.7")
    assert config.policy.mass == 0.7
    settings = grid.read_settings(None, "0.5,0.9", *[None] * 6, "draft,svg,xattention:mass=0.7")
    assert [name.split("-")[2] for name in settings if "sparsity0.5" in name] == ["row", "svg", "xattentionmass0.7"]
    assert len(settings) == 6


@pytest.mark.parametrize("command", ["generate", "masks", "compare", "recall"])
def test_an_unknown_policy_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: 1 / 0)
    assert run(monkeypatch, command, "--model", TINY_WAN, "--prompt", "a dog", "--policy", "svgg") == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("draftattn: policy is 'svgg'; choose from draft, svg, adaspa")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--policies", "svgg"], "policy is 'svgg'"),
        (["--policies", "svg+more"], "after + write residual, plain, frame, space-time"),
        (["--densities", "2"], "densities holds 2.0"),
        (["--densities", "half"], "densities is 'half'"),
        (["--warmups", "5"], "warmup is 5.0"),
        (["--layers", "99"], "layers names 99; there are 0 to "),
        (["--at-steps", "9"], "at-steps names 9"),
        (["--recall-prompts", "0"], "recall-prompts is 0"),
        (["--time-size", "64x96"], "time-size is '64x96'"),
        (["--time-size", "64x95x5"], "width is 95"),
        (["--plot", "plot.txt"], "must end in .svg"),
        (["--height", "65"], "height is 65"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_contest_checks_before_it_loads(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    given: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: 1 / 0)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", TINY_WAN, "--prompt", "a dog", *SMALL, *given]
    assert run(monkeypatch, "bench", "policies", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_contest_prints_its_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--model", TINY_WAN, "--prompt", "a dog", *SMALL, "--policies", "published,svg+residual"]
    arguments += ["--densities", "0.5", "--warmups", "0", "--layers", "0,-1", "--at-steps", "1"]
    arguments += ["--output", str(tmp_path / "contest")]
    assert run(monkeypatch, "bench", "policies", *arguments) == 0
    printed = capsys.readouterr().out
    for words in ("Equal density, warm-up 0", "recall", "psnr within the time of published", "svg+residual"):
        assert words in printed
    result = json.loads((tmp_path / "contest" / "contest.json").read_text())
    assert result["layers"][0] == 0
    assert len(result["layers"]) == 2
    assert [row["setting"]["policy"] for row in result["rows"]] == ["draft", "svg"]
    assert [row["setting"]["residual"] for row in result["rows"]] == [False, True]
