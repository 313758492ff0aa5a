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
        (["--dense-layers", "12"], ["layer 12", "0 to 11"]),
        (["--height", "250"], ["height is 250", "multiples of 16"]),
        (["--width", "0"], ["width is 0", "multiples of 16"]),
        (["--frames", "32"], ["frames is 32", "multiple of 4", "33"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--guidance", "-1"], ["guidance is -1"]),
        (["--fps", "0"], ["fps is 0"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--backend", "hopper", "--dtype", "float32"], ["backend 'hopper'", "fp16 or bf16"]),
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
    code = run(monkeypatch, "generate", *arguments, *SMALL, "--warmup", "1", "--against-dense", "--output", str(output))
    assert code == 0
    assert sorted(file.name for file in output.parent.iterdir()) == ["compare.json", "dense.mp4", "draft.mp4"]
    comparison = json.loads((output.parent / "compare.json").read_text())
    assert comparison["draft"]["warmup_steps"] == 1
    assert 0.2 < comparison["draft"]["density"] < 0.3
    assert comparison["settings"]["draft"]["sparsity"] == 0.75
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


def test_bench_model_reports_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    size = ["--height", "64", "--width", "96", "--frames", "5", "--tile", "1x2x2", "--repeats", "1"]
    assert run(monkeypatch, "bench", "model", "--model", TINY_WAN, *size, "--output", str(output)) == 0
    result = json.loads(output.read_text())
    assert result["tokens"] == 2 * 4 * 6
    assert result["gate"]["relative_error"] <= result["gate"]["allowed"]
    assert 0.2 < result["draft"]["density"] < 0.3


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
        (["--backend", "hopper"], ["backend 'hopper'", "fp16 or bf16"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bench_model_checks_before_it_builds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    import draftattn.eval.bench_model

    monkeypatch.setattr(draftattn.eval.bench_model, "build_transformer", None)
    assert run(monkeypatch, "bench", "model", "--model", "wan2.1-1.3b", "--dtype", "float32", *options) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
