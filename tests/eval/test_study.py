import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from draftattn import DraftConfig
from draftattn.errors import InputError
from draftattn.eval import run_study as run_study_module
from draftattn.eval.frames import load_frames, open_video
from draftattn.eval.metrics import score_video
from draftattn.eval.run_study import Listener, density_by_layer_step, run_study
from draftattn.eval.settings import settings_grid
from draftattn.eval.study import Run, Study, StudyFolder
from draftattn.pipelines.video.stats import DraftStats, LayerCall

CPU = torch.device("cpu")
# 2×3×4 tokens in 8 blocks
BASE = DraftConfig(tile=(1, 2, 2), warmup=1)
SIZE = {"height": 48, "width": 64, "num_frames": 5}


@pytest.fixture(scope="module")
def pipe(tiny: ModuleType) -> Any:
    return tiny.wan_pipeline()


def study(**changes: Any) -> Study:
    defaults: dict[str, Any] = {
        "model": "tiny",
        "prompts": ("a dog", "a cat"),
        "seeds": (3,),
        "settings": settings_grid([BASE], {"sparsity": [0.5, 0.9]}),
        **SIZE,
        "num_steps": 3,
        "guidance": 3.0,
        "dtype": "float32",
    }
    return Study(**(defaults | changes))


def run(path: Path, pipe: Any, asked: Study, listener: Listener | None = None) -> StudyFolder:
    folder = StudyFolder.open(path, asked, CPU)
    run_study(folder, asked, lambda: pipe, CPU, listener)
    return folder


def refuse_to_load() -> Any:
    raise AssertionError("nothing was left to do")


def files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "seconds" not in key and "speedup" not in key}


@pytest.fixture(scope="module")
def whole(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A study that ran through."""
    return run(tmp_path_factory.mktemp("whole") / "study", pipe, study())


def test_a_study_leaves_what_its_format_says(whole: StudyFolder) -> None:
    names = [f"{setting}-{prompt}-0" for setting in ("dense", *study().settings) for prompt in (0, 1)]
    expected = [f"runs/{name}.json" for name in names] + [f"videos/{name}.mp4" for name in names]
    expected += ["frames/dense-0-0.mkv", "frames/dense-1-0.mkv", "study.json", "results.jsonl"]
    assert files(whole.path) == sorted(expected)
    content = json.loads((whole.path / "study.json").read_text())
    assert content["format"] == 1
    assert content["prompts"] == ["a dog", "a cat"]
    assert [setting["sparsity"] for setting in content["settings"]] == [0.5, 0.9]
    dense, draft = whole.read(Run(None, 0, 0)), whole.read(Run(list(study().settings)[1], 0, 0))
    assert dense["kind"] == "dense"
    assert len(dense["all_step_seconds"]) == len(draft["all_step_seconds"]) == 3
    assert draft["warmup_steps"] == 1
    assert draft["density_by_layer_step"]["steps"] == [0, 1, 2]
    for values in draft["density_by_layer_step"]["values"]:
        assert values[0] == 1
        assert 0.05 < values[1] < 0.3
    assert draft["speedup"] == pytest.approx(dense["step_seconds"] / draft["step_seconds"], rel=1e-3)
    assert set(draft["metrics"]) == {"psnr", "ssim", "lpips", "flicker"}
    with open_video(whole.path / draft["video"]) as video:
        assert (video.num_frames, video.height, video.width) == (5, 48, 64)


def test_metrics_are_those_of_decoded_frames(whole: StudyFolder, pipe: Any, tiny: ModuleType) -> None:
    from draftattn import enable
    from draftattn.eval.frames import to_bytes
    from draftattn.eval.generation import generate

    name, config = list(study().settings.items())[1]
    arguments = {"prompt": "a cat", **SIZE, "guidance_scale": 3.0}
    dense = to_bytes(generate(pipe, seed=3, num_inference_steps=3, **arguments).video)
    with enable(pipe, config):
        draft = to_bytes(generate(pipe, seed=3, num_inference_steps=3, **arguments).video)
    assert torch.equal(load_frames(whole.frames_file(Run(None, 1, 0))), dense)
    expected = {metric: score.to_json() for metric, score in score_video(draft, dense).items()}
    assert whole.read(Run(name, 1, 0))["metrics"] == expected


def test_results_are_flat_lines(whole: StudyFolder) -> None:
    rows = [json.loads(line) for line in (whole.path / "results.jsonl").read_text().splitlines()]
    assert rows == whole.rows()
    assert sorted(rows, key=str) == sorted(whole.rows_of(study()), key=str)
    assert [(row["sparsity"], row["prompt_text"], row["seed_value"]) for row in rows] == [
        (0.5, "a dog", 3),
        (0.5, "a cat", 3),
        (0.9, "a dog", 3),
        (0.9, "a cat", 3),
    ]
    for row in rows:
        assert not [key for key, value in row.items() if isinstance(value, (list, dict))]
        assert {"psnr_mean", "ssim_worst", "lpips_worst_frame", "flicker_mean", "speedup", "density"} <= set(row)


class Killed(BaseException):
    """What no handler expects."""


def stop_after(count: int) -> Callable[..., None]:
    left = [count]

    def step(*_: object, **__: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return step


def test_a_stopped_study_continues_and_loses_nothing(
    whole: StudyFolder, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "study", []
    generate = run_study_module.generate

    def counted(pipe: Any, **arguments: Any) -> Any:
        result = generate(pipe, **arguments)
        made.append(arguments["prompt"])
        return result

    monkeypatch.setattr(run_study_module, "generate", counted)
    # in the second draft run, in the first, in the dense run of the second prompt, and never
    for steps in (8, 1, 4, 100):
        asked = study()
        try:
            run(path, pipe, asked, Listener(step=stop_after(steps)))
        except Killed:
            folder = StudyFolder.open(path, asked, CPU)
            complete = [made_run for made_run in folder.runs_of(asked) if folder.is_complete(made_run)]
            assert len(complete) == len(made)
            assert [row["setting"] for row in folder.rows()] == [
                made_run.setting for made_run in complete if made_run.setting
            ]
    assert made == ["a dog"] * 3 + ["a cat"] * 3
    assert files(path) == files(whole.path)
    resumed = StudyFolder.open(path, study(), CPU).rows()
    assert [without_times(row) for row in resumed] == [without_times(row) for row in whole.rows()]


@pytest.mark.parametrize("function", ["save_frames", "score_video"])
def test_a_run_is_complete_only_when_all_of_it_is_there(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    original = getattr(run_study_module, function)
    monkeypatch.setattr(run_study_module, function, stop_after(0))
    asked = study(prompts=("a dog",), settings=settings_grid([BASE], {}))
    with pytest.raises(Killed):
        run(tmp_path / "study", pipe, asked)
    folder = StudyFolder.open(tmp_path / "study", asked, CPU)
    assert len(folder.outstanding(asked)) == (1 if function == "score_video" else 2)
    monkeypatch.setattr(run_study_module, function, original)
    run_study(folder, asked, lambda: pipe, CPU)
    assert folder.outstanding(asked) == []


def test_nothing_is_loaded_where_nothing_is_left(whole: StudyFolder) -> None:
    before = (whole.path / "results.jsonl").read_text()
    (whole.path / "results.jsonl").unlink()
    run_study(StudyFolder.open(whole.path, study(), CPU), study(), refuse_to_load, CPU)
    assert (whole.path / "results.jsonl").read_text() == before


def test_a_study_grows(whole: StudyFolder, pipe: Any, tmp_path: Path) -> None:
    settings = settings_grid([BASE], {"sparsity": [0.5]})
    one = study(prompts=("a cat",), settings=settings)
    folder = run(tmp_path / "study", pipe, one)
    more = study(prompts=("a dog", "a cat"), seeds=(3, 4), settings=settings_grid([BASE], {"sparsity": [0.9, 0.5]}))
    grown = StudyFolder.open(folder.path, more, CPU)
    assert grown.content["prompts"] == ["a cat", "a dog"]
    assert grown.content["seeds"] == [3, 4]
    assert [setting["sparsity"] for setting in grown.content["settings"]] == [0.5, 0.9]
    complete = [made for made in grown.runs_of(more) if grown.is_complete(made)]
    assert [made.name for made in complete] == ["dense-0-0", f"{next(iter(settings))}-0-0"]
    # asked for less than there is, the rest stays
    assert len(StudyFolder.open(folder.path, one, CPU).content["prompts"]) == 2
    (row,) = grown.rows()
    assert without_times(row) == {**without_times(whole.rows()[1]), "prompt": 0, "video": row["video"]}


def test_lost_dense_frames_are_made_again_where_they_are_needed(pipe: Any, tmp_path: Path) -> None:
    asked = study(prompts=("a dog",), settings=settings_grid([BASE], {"sparsity": [0.5]}))
    folder = run(tmp_path / "study", pipe, asked)
    (folder.path / "frames" / "dense-0-0.mkv").unlink()
    assert folder.outstanding(asked) == []
    more = replace(asked, settings=settings_grid([BASE], {"sparsity": [0.5, 0.75]}))
    assert [made.name.split("-")[0] for made in folder.outstanding(more)] == ["dense", "sparsity0.75"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 96}, "height 48, and now it is 96"),
        ({"num_steps": 4, "guidance": 1.0}, "num_steps 3, guidance 3.0, and now it is 4, 1.0"),
        ({"model": "other"}, "model 'tiny', and now it is 'other'"),
        ({"compiled": True}, "compiled False, and now it is True"),
    ],
)
def test_another_study_is_refused(whole: StudyFolder, changes: dict[str, Any], words: str) -> None:
    before = (whole.path / "study.json").read_text()
    with pytest.raises(InputError, match=words):
        StudyFolder.open(whole.path, study(**changes), CPU)
    assert (whole.path / "study.json").read_text() == before


def test_a_study_from_before_compiled_was_noted_continues(tmp_path: Path) -> None:
    asked = study()
    folder = StudyFolder.open(tmp_path / "study", asked, CPU)
    content = {key: value for key, value in folder.content.items() if key != "compiled"}
    (folder.path / "study.json").write_text(json.dumps(content))
    assert StudyFolder.open(folder.path, asked, CPU).content["compiled"] is False
    with pytest.raises(InputError, match="compiled False, and now it is True"):
        StudyFolder.open(folder.path, replace(asked, compiled=True), CPU)


def test_other_versions_are_refused(whole: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import draftattn.eval.study as module

    versions = {**module.package_versions(), "torch": "1.0"}
    monkeypatch.setattr(module, "package_versions", lambda: versions)
    with pytest.raises(InputError, match=rf"versions torch {torch.__version__.split('+')[0]}.*now it is torch 1\.0"):
        StudyFolder.open(whole.path, study(), CPU)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(InputError, match="holds something else"):
        StudyFolder.open(tmp_path, study(), CPU)
    (tmp_path / "study.json").write_text("{half")
    with pytest.raises(InputError, match=r"study\.json.*cannot be read"):
        StudyFolder.open(tmp_path, study(), CPU)
    with pytest.raises(InputError, match="cannot be written"):
        StudyFolder.open(Path("/proc/study"), study(), CPU)


def test_leftovers_of_a_killed_run_are_removed(whole: StudyFolder) -> None:
    names = ("runs/.dense-0-0.123.json", "frames/.dense-0-0.123.mkv", "videos/.a.1.mp4", ".report.123.html")
    leftovers = [whole.path / name for name in names]
    for file in leftovers:
        file.write_text("half")
    before = files(whole.path)
    StudyFolder.open(whole.path, study(), CPU)
    assert set(before) - set(files(whole.path)) == {file.relative_to(whole.path).as_posix() for file in leftovers}


def test_a_full_disk_leaves_what_was_there(whole: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (whole.path / "results.jsonl").read_text()

    def full(path: Path, text: str, **options: Any) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"results\.jsonl' could not be written: No space left on device"):
        whole.write_results()
    assert (whole.path / "results.jsonl").read_text() == before
    assert not list(whole.path.glob(".*"))


def test_density_of_layers_and_steps() -> None:
    def call(step: int | None, layer: int, density: float, branch: str) -> LayerCall:
        return LayerCall("transformer", step, branch, layer, density < 1, density, 0.0)

    calls = [call(0, 0, 1.0, "cond"), call(1, 0, 0.2, "cond"), call(1, 0, 0.4, "uncond"), call(1, 2, 0.5, "cond")]
    found = density_by_layer_step(DraftStats([*calls, call(None, 7, 0.1, "cond")]))
    assert found == {"layers": [0, 2], "steps": [0, 1], "values": [[1.0, 0.3], [None, 0.5]]}


def test_the_pipeline_is_as_it_was(pipe: Any, tmp_path: Path) -> None:
    before = dict(pipe._progress_bar_config)
    run(tmp_path / "study", pipe, study(prompts=("a dog",), settings=settings_grid([BASE], {})))
    assert pipe._progress_bar_config == before
    assert not hasattr(pipe, "draft")
