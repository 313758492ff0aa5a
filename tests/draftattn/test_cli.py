import json
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from draftattn.cli import main

TINY_WAN = str(Path(__file__).parents[2] / "assets" / "tiny-wan")
SMALL = ["--height", "64", "--width", "96", "--frames", "5", "--steps", "3", "--guidance", "3"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["draftattn", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code if isinstance(stop.value.code, int) else 0


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sparsity", "1"], ["sparsity is 1.0", "[0, 1)"]),
        (["--sparsity", "-0.1"], ["sparsity is -0.1", "[0, 1)"]),
        (["--warmup", "1.5"], ["warmup is 1.5", "share", "number of steps"]),
        (["--warmup", "some"], ["warmup is 'some'"]),
        (["--tile", "1x16x16"], ["1×16×16 holds 256 tokens", "at most 128"]),
        (["--tile", "8x16"], ["tile is '8x16'", "1x8x16"]),
        (["--selection", "column"], ["selection is 'column'", "row, head"]),
        (["--preset", "fastest"], ["preset is 'fastest'", "balanced"]),
        (["--backend", "cuda"], ["backend is 'cuda'", "triton"]),
        (["--dense-backend", "cuda"], ["dense_backend is 'cuda'", "cudnn", "torch"]),
        (["--dense-layers", "12"], ["layer 12", "0 to 9"]),
        (["--height", "250"], ["height is 250", "multiples of 16"]),
        (["--width", "0"], ["width is 0", "multiples of 16"]),
        (["--frames", "32"], ["frames is 32", "multiple of 4", "33"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--guidance", "-1"], ["guidance is -1"]),
        (["--fps", "0"], ["fps is 0"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--backend", "hopper", "--dtype", "float32"], ["backend 'hopper'", "fp16 or bf16"]),
        (["--dense-backend", "hopper", "--dtype", "float32"], ["dense_backend 'hopper'", "fp16 or bf16"]),
        (["--output", "/proc/video.mp4"], ["/proc/video.mp4", "cannot be written"]),
        (["--output", "video.gif"], ["video.gif", ".mp4"]),
        (["--output", "/proc/none/video.mp4"], ["/proc/none/video.mp4", "cannot be written"]),
        (["--model", "no-such-folder"], ["no-such-folder", "not a folder"]),
        (["--image", "no-such-image.png"], ["no-such-image.png", "not a file"]),
        (["--prompt-file", "prompts.txt"], ["either --prompt or --prompt-file"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_input_is_one_sentence_and_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "generate", "--model", TINY_WAN, "--prompt", "a dog", *options) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("draftattn: ")
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not list(tmp_path.glob("**/*.mp4"))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_unsupported_transformer_lists_the_supported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    index = {"_class_name": "SanaVideoPipeline", "transformer": ["diffusers", "SanaVideoTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert run(monkeypatch, "generate", "--model", str(tmp_path), "--prompt", "a dog") == 2
    message = capsys.readouterr().err
    for word in ("SanaVideoTransformer3DModel", "HunyuanVideoTransformer3DModel", "WanTransformer3DModel"):
        assert word in message


def test_generate_against_dense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "videos" / "draft.mp4"
    arguments = ["--model", TINY_WAN, "--prompt", "hands moving red cups on a white table", "--tile", "1x2x2"]
    arguments += ["--dense-backend", "torch"]
    code = run(monkeypatch, "generate", *arguments, *SMALL, "--warmup", "1", "--against-dense", "--output", str(output))
    assert code == 0
    assert sorted(file.name for file in output.parent.iterdir()) == ["compare.json", "dense.mp4", "draft.mp4"]
    comparison = json.loads((output.parent / "compare.json").read_text())
    assert comparison["draft"]["warmup_steps"] == 1
    assert 0.2 < comparison["draft"]["density"] < 0.3
    assert comparison["settings"]["draft"]["sparsity"] == 0.75
    assert comparison["settings"]["draft"]["dense_backend"] == "torch"
    assert len(comparison["quality"]["psnr"]["per_frame"]) == 5
    assert 10 < comparison["quality"]["psnr"]["mean"] < 60
    assert comparison["versions"]["torch"]
    assert "PSNR" in capsys.readouterr().out


def test_sparsity_0_is_dense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "draft.mp4"
    arguments = ["--model", TINY_WAN, "--prompt", "a dog", "--sparsity", "0", "--warmup", "0", "--dtype", "float32"]
    assert run(monkeypatch, "generate", *arguments, *SMALL, "--against-dense", "--output", str(output)) == 0
    quality = json.loads((tmp_path / "compare.json").read_text())["quality"]
    assert quality["psnr"]["worst"] is None or quality["psnr"]["worst"] > 60


def test_prompt_file_makes_numbered_videos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n\na cat\n")
    output = tmp_path / "video.mp4"
    arguments = ["--model", TINY_WAN, "--prompt-file", str(prompts), "--output", str(output)]
    assert run(monkeypatch, "generate", *arguments, *SMALL, "--steps", "1") == 0
    assert sorted(file.name for file in tmp_path.glob("*.mp4")) == ["video-000.mp4", "video-001.mp4"]


def test_empty_prompt_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n")
    assert run(monkeypatch, "generate", "--model", TINY_WAN, "--prompt-file", str(prompts)) == 2
    assert "holds no prompt" in capsys.readouterr().err


def test_interrupt_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import draftattn.eval.video

    class Writer:
        def __init__(self, path: Path, **kwargs: Any) -> None:
            Path(path).write_bytes(b"half")

        def __enter__(self) -> "Writer":
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def append_data(self, frame: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(draftattn.eval.video.imageio, "get_writer", Writer)
    output = tmp_path / "draft.mp4"
    arguments = ["--model", TINY_WAN, "--prompt", "a dog", "--output", str(output)]
    assert run(monkeypatch, "generate", *arguments, *SMALL, "--steps", "1") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_doctor_names_every_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "doctor") == 0
    shown = capsys.readouterr().out
    for word in ("torch", "diffusers", "triton", "cpu", "reference", "chosen"):
        assert word in shown


def test_bench_model_reports_every_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import draftattn.eval.bench_model

    text = {"seconds": 0.5, "peak_memory_gib": 1.0, "encoders": []}
    decode = {"seconds": 2.0, "peak_memory_gib": 3.0, "tiled": True, "dtype": "float32"}
    stages = {"text": text, "decode": decode}
    monkeypatch.setattr(draftattn.eval.bench_model, "measure_stages", lambda *_, **__: stages)
    output = tmp_path / "bench.json"
    size = ["--height", "64", "--width", "96", "--frames", "5", "--tile", "1x2x2", "--repeats", "1", "--steps", "10"]
    arguments = ["--model", TINY_WAN, *size, "--warmups", "0.25", "--sparsity", "0.5,0.75", "--output", str(output)]
    assert run(monkeypatch, "bench", "model", *arguments) == 0
    result = json.loads(output.read_text())
    assert result["tokens"] == 2 * 4 * 6
    assert result["gate"]["relative_error"] <= result["gate"]["allowed"]
    assert [row["kind"] for row in result["runs"]] == ["stock", "dense", "draft", "draft"]
    assert 0.2 < result["runs"][-1]["density"] < 0.3
    assert [run["warmup_steps"] for run in result["whole_runs"]] == [3, 3]
    shown = capsys.readouterr().out
    for words in ("best dense", "75 % sparsity", "matrix products", "Whole run, 10 steps of 2 passes", "decoding"):
        assert words in shown


def test_bench_scaling_writes_figures_and_a_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from draftattn.eval import architectures

    settings = {**architectures._WAN, "num_attention_heads": 2, "num_layers": 3, "ffn_dim": 64, "text_dim": 16}
    small = architectures.Architecture(
        architectures.Part("WanTransformer3DModel", settings),
        architectures.Part("AutoencoderKLWan"),
        (),
        architectures.Recipe(64, 96, 9),
    )
    monkeypatch.setitem(architectures.ARCHITECTURES, "small", small)
    output, plot = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    arguments = ["--model", "small", "--tokens", "24,72", "--tile", "1x2x2", "--repeats", "1", "--curve", "0.5,0.9"]
    arguments += ["--dtype", "float32", "--output", str(output), "--plot", str(plot)]
    assert run(monkeypatch, "bench", "scaling", *arguments) == 0
    result = json.loads(output.read_text())
    assert [row["tokens"] for row in result["rows"][::4]] == [24, 72]
    assert len(result["curve"]) == 2
    picture = plot.read_text()
    for words in ("stock diffusers", "draft, 90 % sparsity", "seconds of a forward pass"):
        assert f"<!-- {words} -->" in picture
    assert "90 % sparsity" in capsys.readouterr().out
    again = tmp_path / "again.svg"
    assert run(monkeypatch, "bench", "plot", str(output), str(again)) == 0
    assert "draft, 90 % sparsity" in again.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokens", "8k"], "tokens is '8k'"),
        (["--tokens", "0"], "tokens is [0]"),
        (["--blocks", "0"], "blocks is 0"),
        (["--curve", "1"], "sparsity holds 1"),
        (["--plot", "scaling.gif"], "must end in"),
        (["--height", "100"], "height is 100"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bench_scaling_checks_before_it_builds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    pytest.importorskip("matplotlib")
    import draftattn.eval.scaling

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draftattn.eval.scaling, "build_transformer", None)
    assert run(monkeypatch, "bench", "scaling", "--model", "wan2.1-1.3b", *options) == 2
    assert words in capsys.readouterr().err


def test_bench_model_refuses_unknown_architectures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "bench", "model", "--model", "wan9") == 2
    assert "wan2.1-1.3b" in capsys.readouterr().err


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("draftattn 0.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--height", "72"], ["height is 72", "multiples of 16"]),
        (["--frames", "0"], ["frames is 0"]),
        (["--repeats", "0"], ["repeats is 0"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--sparsity", "0.5,1"], ["sparsity holds 1"]),
        (["--warmups", "x"], ["warmups is 'x'"]),
        (["--dense-layers", "30"], ["layer 30", "layers 0 to 29"]),
        (["--context-parallel"], ["torchrun --nproc-per-node 2"]),
        (["--backend", "hopper"], ["backend 'hopper'", "fp16 or bf16"]),
        (["--dense-backend", "hopper"], ["dense_backend 'hopper'", "fp16 or bf16"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bench_model_checks_before_it_builds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    import draftattn.eval.bench_model

    monkeypatch.setattr(draftattn.eval.bench_model, "build_transformer", None)
    monkeypatch.setattr(draftattn.eval.bench_model, "measure_stages", None)
    assert run(monkeypatch, "bench", "model", "--model", "wan2.1-1.3b", "--dtype", "float32", *options) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


STUDY = ["--model", TINY_WAN, "--prompt", "a dog"]


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("command", ["compare", "recall"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt-file", "prompts.txt"], ["one of --prompt, --prompt-file and --vbench"]),
        (["--seeds", "0,x"], ["seeds is '0,x'", "0,1"]),
        (["--sparsity", "0.5,1"], ["sparsity is 1.0", "[0, 1)"]),
        (["--sparsity", "half"], ["sparsity is 'half'"]),
        (["--sparsity", ","], ["sparsity is ','", "at least one"]),
        (["--selection", "row,column"], ["selection is 'column'", "row, head"]),
        (["--tile", "auto,8x16"], ["tile is '8x16'", "1x8x16"]),
        (["--preset", "fast,faster"], ["preset is 'faster'"]),
        (["--max-prompts", "0"], ["max-prompts is 0"]),
        (["--height", "250"], ["height is 250", "multiples of 16"]),
        (["--frames", "4"], ["frames is 4", "multiple of 4"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--image", "image.png"], ["WanPipeline takes no --image"]),
        (["--model", "no-such-folder"], ["no-such-folder", "not a folder"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_compare_and_recall_refuse_before_they_load(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: str,
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, command, *STUDY, *options) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("draftattn: ")
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--frames", "1"], ["flicker needs at least 2 frames"]),
        (["compare", "--warmup", "0.25,often"], ["warmup is 'often'"]),
        (["compare", "--residual", "maybe"], ["residual is 'maybe'", "yes, no"]),
        (["compare", "--fps", "0"], ["fps is 0"]),
        (["compare", "--dense-backend", "cuda"], ["dense_backend is 'cuda'", "cudnn, flash, torch"]),
        (["compare", "--output", "/proc/study"], ["/proc/study", "cannot be written"]),
        (["recall", "--layers", "12"], ["layers names 12", "0 to 9"]),
        (["recall", "--at-steps", "0,50"], ["at-steps names 50", "0 to 49"]),
        (["recall", "--layers", "all"], ["layers is 'all'"]),
        (["recall", "--output", "recall.txt"], ["recall.txt", ".json"]),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("compare", "recall") else "",
)
def test_compare_and_recall_have_their_own_refusals(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, arguments[0], *STUDY, *arguments[1:]) == 2
    message = capsys.readouterr().err.strip()
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


@pytest.fixture
def random_pipeline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline of a few thousand parameters in place of the trained one."""
    import importlib.util

    from draftattn.eval import loading

    path = Path(__file__).parents[1] / "pipelines" / "video" / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("draftattn_tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pipe = module.wan_pipeline()
    monkeypatch.setattr(loading, "load_pipeline", lambda *arguments: pipe)
    return pipe


GRID = ["--height", "48", "--width", "64", "--frames", "5", "--steps", "2", "--tile", "1x2x2"]


@pytest.mark.usefixtures("random_pipeline")
def test_compare_prints_a_line_for_every_result_and_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    asked = [*STUDY, *GRID, "--warmup", "1", "--sparsity", "0.5,0.9", "--output", str(folder)]
    assert run(monkeypatch, "compare", *asked, "--json") == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["sparsity"] for row in rows] == [0.5, 0.9]
    assert rows == [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert str(folder / "report.html") in printed.err.replace("\n", "")
    assert (folder / "report.html").stat().st_size > 10_000

    monkeypatch.setattr("draftattn.eval.loading.load_pipeline", None)
    assert run(monkeypatch, "compare", *asked, "--markdown") == 0
    shown = capsys.readouterr().out
    assert "3 of 3 videos are there already" in shown
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert "sparsity0.9" in table[3]
    assert run(monkeypatch, "compare", *asked, "--guidance", "2") == 2
    assert "made with guidance 5.0, and now it is 2.0" in capsys.readouterr().err


def test_interrupted_compare_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, random_pipeline: Any
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(random_pipeline), "__call__", interrupt)
    assert run(monkeypatch, "compare", *STUDY, *GRID, "--output", str(tmp_path / "study")) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.usefixtures("random_pipeline")
def test_recall_prints_and_writes_every_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "recall.json"
    asked = [*STUDY, *GRID, "--sparsity", "0.5,0.75", "--layers", "0,-8", "--at-steps", "-1"]
    assert run(monkeypatch, "recall", *asked, "--json", "--output", str(output)) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    content = json.loads(output.read_text())
    assert content["calls"] == rows
    assert {(row["layer"], row["step"]) for row in rows} == {(0, 1), (2, 1)}
    assert [entry["setting"] for entry in content["means"]] == [entry["name"] for entry in content["settings"]]
    assert all(entry["recall_random"] < entry["recall_best"] <= 1 for entry in content["means"])


def small_video(path: Path, frames: int = 4, side: int = 48, seed: int = 0) -> str:
    import torch

    from draftattn.eval.video import save_video

    save_video(path, torch.rand(frames, 3, side, 64, generator=torch.Generator().manual_seed(seed)), fps=8)
    return str(path)


def test_metrics_of_two_videos(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, other = (small_video(tmp_path / f"{seed}.mp4", seed=seed) for seed in (0, 1))
    assert run(monkeypatch, "metrics", one, other, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_frames"], result["height"], result["width"]) == (4, 48, 64)
    assert 3 < result["psnr"]["mean"] < 15
    assert len(result["lpips"]["per_frame"]) == 4
    assert run(monkeypatch, "metrics", one, one, "--metric", "psnr,flicker") == 0
    shown = capsys.readouterr().out
    assert "identical" in shown
    assert "SSIM" not in shown


def test_metrics_refuse_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one = small_video(tmp_path / "one.mp4")
    longer, smaller = small_video(tmp_path / "longer.mp4", frames=5), small_video(tmp_path / "smaller.mp4", side=32)
    still, text = small_video(tmp_path / "still.mp4", frames=1), tmp_path / "text.mp4"
    text.write_text("no video")
    for arguments, words in (
        ((one, longer), ["one.mp4' has 4 frames of 48×64", "longer.mp4' has 5 frames of 48×64"]),
        ((one, smaller), ["4 frames of 48×64", "4 frames of 32×64"]),
        ((one, str(text)), ["text.mp4' cannot be read"]),
        ((one, "none.mp4"), ["none.mp4' is not a file"]),
        ((still, still), ["flicker needs at least 2 frames; the video has 1"]),
        ((one, one, "--metric", "vmaf"), ["metric is 'vmaf'", "psnr, ssim, lpips, flicker"]),
        ((one, one, "--metric", ","), ["metric is ','"]),
    ):
        assert run(monkeypatch, "metrics", *arguments) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("draftattn: ")
        for word in words:
            assert word in message
