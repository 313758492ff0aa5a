"""The report's content, without a browser."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from draftattn.cli import main
from draftattn.errors import InputError
from draftattn.eval.report import read_study, write_report

MakeStudy = Callable[..., dict[str, Any]]


class Page(HTMLParser):
    """What a page holds: addresses it refers to, and the text of script elements by id."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self._script: str | None = None
        self._inside = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.addresses += [found[name] or "" for name in ("src", "href", "poster", "srcset") if name in found]
        self._inside = tag == "script"
        self._script = found.get("id")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    @property
    def data(self) -> dict[str, Any]:
        """What the page's scripts read."""
        return json.loads(self.scripts["data"])


def test_page_needs_nothing_but_itself(tmp_path: Path, make_study: MakeStudy) -> None:
    make_study(tmp_path)
    path = write_report(tmp_path)
    page = Page(path)
    assert [address for address in page.addresses if not address.startswith("#")] == []
    assert "connect-src" not in path.read_text()
    assert "default-src 'none'" in path.read_text()
    videos = page.data["videos"]
    assert len(videos) == 6
    for name, place in videos.items():
        assert base64.b64decode(page.scripts[place["id"]]) == (tmp_path / name).read_bytes()


def test_words_of_users_stay_words(tmp_path: Path, make_study: MakeStudy) -> None:
    make_study(tmp_path)
    content = write_report(tmp_path).read_text()
    assert "<b>cups</b>" not in content
    assert "</script><b>" not in content
    page = Page(tmp_path / "report.html")
    assert page.data["prompts"][1] == "</script><b>cups</b> {{data}}"
    assert content.count('"num_frames"') == 1  # a slot's name inside a prompt is not filled


def test_figures_of_a_setting(tmp_path: Path, make_study: MakeStudy) -> None:
    runs = make_study(tmp_path, seeds=(0, 5))
    write_report(tmp_path)
    data = Page(tmp_path / "report.html").data
    info = json.loads((tmp_path / "study.json").read_text())
    assert [setting["label"] for setting in data["settings"]] == ["50 % sparsity", "75 % sparsity"]
    for setting, described in zip(info["settings"], data["settings"], strict=True):
        mine = [run for run in runs.values() if run.get("setting") == setting["name"]]
        assert described["num_runs"] == len(mine) == 4
        assert described["values"]["speedup"] == pytest.approx(fmean(run["speedup"] for run in mine))
        for metric, pick in (("psnr", min), ("ssim", min), ("lpips", max), ("flicker", max)):
            scores = [run["metrics"][metric] for run in mine]
            assert described["values"][metric] == pytest.approx(fmean(score["mean"] for score in scores))
            worst = described["worst"][metric]
            assert worst["value"] == pick(score["worst"] for score in scores)
            run = data["runs"][worst["run"]]
            assert run["curves"][metric][worst["frame"]] == pytest.approx(worst["value"], rel=1e-4)
        assert f"{described['values']['psnr']:.1f} dB" in described["lede"]
    psnrs = [setting["values"]["psnr"] for setting in data["settings"]]
    assert f"PSNR {min(psnrs):.1f} to {max(psnrs):.1f} dB" in (tmp_path / "report.html").read_text()


def test_a_measure_of_changes_stands_at_the_later_frame(tmp_path: Path, make_study: MakeStudy) -> None:
    runs = make_study(tmp_path, num_prompts=1, sparsity=[0.75])
    name = next(name for name in runs if not name.startswith("dense"))
    scores = runs[name]["metrics"]["flicker"]
    shorter = {**scores, "per_frame": scores["per_frame"][1:], "worst_frame": scores["worst_frame"] - 1}
    write_report(tmp_path)
    before = Page(tmp_path / "report.html").data["runs"]
    path = tmp_path / "runs" / f"{name}.json"
    path.write_text(json.dumps({**runs[name], "metrics": {**runs[name]["metrics"], "flicker": shorter}}))
    write_report(tmp_path)
    assert Page(tmp_path / "report.html").data["runs"] == before


def test_identical_videos(tmp_path: Path, make_study: MakeStudy) -> None:
    runs = make_study(tmp_path, num_prompts=1, sparsity=[0.0])
    name = next(name for name in runs if not name.startswith("dense"))
    same = {"mean": None, "worst": None, "worst_frame": 0, "per_frame": [None] * 9}
    (tmp_path / "runs" / f"{name}.json").write_text(json.dumps({**runs[name], "metrics": {"psnr": same}}))
    content = write_report(tmp_path).read_text()
    assert "identical to dense" in content
    assert "identical to those of dense attention" in content
    data = Page(tmp_path / "report.html").data
    assert data["settings"][0]["values"]["psnr"] is None
    assert [metric["key"] for metric in data["metrics"]] == ["psnr"]


def test_opens_with_the_default_settings(tmp_path: Path, make_study: MakeStudy) -> None:
    make_study(tmp_path, num_prompts=1, sparsity=[0.5, 0.75, 0.9], warmup=[0.0, 0.25], selection=["head", "row"])
    write_report(tmp_path)
    data = Page(tmp_path / "report.html").data
    chosen = data["settings"][data["runs"][data["chosen"]]["setting"]]
    assert chosen["label"] == "75 % sparsity, warm-up 25 %, per row"


def test_videos_beyond_the_budget_are_linked(tmp_path: Path, make_study: MakeStudy) -> None:
    make_study(tmp_path)
    sizes = {f"videos/{path.name}": path.stat().st_size for path in (tmp_path / "videos").iterdir()}
    write_report(tmp_path, embed_megabytes=0)
    page = Page(tmp_path / "report.html")
    assert page.data["videos"] == {name: {"href": name} for name in sizes}
    assert "keep them together" in (tmp_path / "report.html").read_text()

    data = page.data
    chosen = data["runs"][data["chosen"]]
    partner = next(run for run in data["dense"] if run["prompt"] == chosen["prompt"])
    pair = {chosen["video"], partner["video"]}
    write_report(tmp_path, embed_megabytes=(sum(sizes[name] for name in pair) + 10) / 1e6)
    places = Page(tmp_path / "report.html").data["videos"]
    assert {name for name, place in places.items() if "id" in place} == pair
    assert "2 of 6 videos are inside this page" in (tmp_path / "report.html").read_text()


def test_unfinished_study(tmp_path: Path, make_study: MakeStudy) -> None:
    runs = make_study(tmp_path)
    drafts = [name for name in runs if not name.startswith("dense")]
    for name in drafts[1:]:
        (tmp_path / "runs" / f"{name}.json").unlink()
    content = write_report(tmp_path).read_text()
    assert "1 of 4 draft videos so far" in content
    (tmp_path / "runs" / f"{drafts[0]}.json").unlink()
    with pytest.raises(InputError, match="no finished draft run"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == content


def test_bad_folders_are_named(tmp_path: Path, make_study: MakeStudy) -> None:
    with pytest.raises(InputError, match=r"holds no study\.json"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="format 2"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text('{"format": 1')
    with pytest.raises(InputError, match=r"study\.json' cannot be read"):
        read_study(tmp_path)


def test_full_disk_leaves_the_page_before(
    tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_study(tmp_path, num_prompts=1)
    page = write_report(tmp_path)
    before = page.read_bytes()

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_report(tmp_path)
    assert page.read_bytes() == before
    assert not list(tmp_path.glob(".report*"))


def test_command(
    tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_study(tmp_path, num_prompts=1)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["draftattn", "report", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code if isinstance(stop.value.code, int) else 0

    assert run(str(tmp_path)) == 0
    assert "report.html" in re.sub(r"\s", "", capsys.readouterr().out)
    assert run(str(tmp_path), "--embed", "-1") == 2
    assert "embed_megabytes is -1" in capsys.readouterr().err
    assert run(str(tmp_path / "none")) == 2
    assert "holds no study.json" in capsys.readouterr().err
