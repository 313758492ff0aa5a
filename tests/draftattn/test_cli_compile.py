"""``--compile``: the blocks run as graphs, and nothing else changes."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import draftattn.eval.video
from draftattn import TokenGrid, enable
from draftattn.cli import main
from draftattn.eval import loading

TINY_WAN = str(Path(__file__).parents[2] / "assets" / "tiny-wan")
ASKED = ["--model", TINY_WAN, "--prompt", "a dog", "--height", "48", "--width", "64", "--frames", "5"]
ASKED += ["--steps", "3", "--warmup", "1", "--tile", "1x2x2"]
GRID = TokenGrid(3, 5, 7)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["draftattn", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code if isinstance(stop.value.code, int) else 0


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts graphs, which are traced as ever and then run by torch: the compiler behind would take a minute."""
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # pytest would keep some thousand lines of it
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch.compiler.reset()
    yield counter
    torch.compiler.reset()


@pytest.fixture
def pipe(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Random weights in place of those of the model asked for."""
    pipe = tiny.wan_pipeline()
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pipe)
    return pipe


@pytest.mark.usefixtures("pipe")
def test_generate_makes_the_same_videos(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    graphs: CompileCounterWithBackend,
) -> None:
    saved: dict[Path, Tensor] = {}
    monkeypatch.setattr(draftattn.eval.video, "save_video", lambda path, video, fps: saved.update({path: video}))
    for folder, given in (("plain", []), ("compiled", ["--compile"])):
        output = tmp_path / folder / "draft.mp4"
        output.parent.mkdir()
        assert run(monkeypatch, "generate", *ASKED, "--against-dense", "--output", str(output), *given) == 0
        assert json.loads((output.parent / "compare.json").read_text())["settings"]["compiled"] is bool(given)
        assert graphs.frame_count == 2 * len(given)  # of dense and of draft attention, for all layers and steps
        assert ("a minute or so" in capsys.readouterr().out) is bool(given)
    for name in ("dense.mp4", "draft.mp4"):
        torch.testing.assert_close(
            saved[tmp_path / "compiled" / name], saved[tmp_path / "plain" / name], rtol=1e-3, atol=1e-4
        )


@pytest.mark.usefixtures("pipe")
def test_compare_notes_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    graphs: CompileCounterWithBackend,
) -> None:
    folder = tmp_path / "study"
    asked = [*ASKED, "--sparsity", "0.5,0.9", "--output", str(folder)]
    assert run(monkeypatch, "compare", *asked, "--compile") == 0
    assert graphs.frame_count == 2
    assert json.loads((folder / "study.json").read_text())["compiled"] is True
    capsys.readouterr()
    assert run(monkeypatch, "compare", *asked) == 2
    assert "made with compiled True, and now it is False" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_it_is_refused_with_sequential_offload(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(loading, "load_pipeline", None)
    assert run(monkeypatch, command, *ASKED, "--compile", "--offload", "sequential") == 2
    message = capsys.readouterr().err
    for words in ("offload is 'sequential' with --compile", "use --offload model"):
        assert words in message


def test_every_transformer_is_compiled(tiny: ModuleType, graphs: CompileCounterWithBackend) -> None:
    pipe = tiny.wan_pipeline(tiny.wan_transformer(), tiny.wan_transformer(1), boundary_ratio=0.5)
    plain = tiny.generate(pipe)
    loading.compile_blocks(pipe)
    torch.testing.assert_close(tiny.generate(pipe), plain, rtol=1e-3, atol=1e-4)
    assert graphs.frame_count == 1
    for transformer in (pipe.transformer, pipe.transformer_2):
        assert all(block._compiled_call_impl is not None for block in transformer.blocks)


def test_offload_of_whole_models(tiny: ModuleType, graphs: CompileCounterWithBackend) -> None:
    """As diffusers does it for the models of a pipeline, from an accelerator only."""
    pipe, inputs = tiny.wan_pipeline(), tiny.wan_inputs(GRID)
    inputs = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    model = pipe.transformer
    enable(model, tiny.config())
    plain = tiny.run(model.to(DEVICE), inputs)
    model.to("cpu")
    _, hook = accelerate.cpu_offload_with_hook(model, execution_device=DEVICE)
    loading.compile_blocks(pipe)
    for _ in range(2):
        torch.testing.assert_close(tiny.run(model, inputs), plain, rtol=1e-4, atol=2e-5)
        hook.offload()
    assert graphs.frame_count == 1


@pytest.mark.parametrize("family", ["hunyuan", "hunyuan_15"])
def test_prompts_of_any_length_share_a_graph(tiny: ModuleType, graphs: CompileCounterWithBackend, family: str) -> None:
    """Only as many text tokens as a prompt has take part, and torch gives up after eight graphs of one block."""

    class Pipeline:
        transformer = getattr(tiny, f"{family}_transformer")()

    enable(Pipeline.transformer, tiny.config())
    lengths = [5, 9, 3]
    inputs = [getattr(tiny, f"{family}_inputs")(GRID, lengths=(length,)) for length in lengths]
    plain = [tiny.run(Pipeline.transformer, given) for given in inputs]
    loading.compile_blocks(Pipeline())
    counts = []
    for given, expected in zip(inputs, plain, strict=True):
        torch.testing.assert_close(tiny.run(Pipeline.transformer, given), expected, rtol=1e-4, atol=2e-5)
        counts.append(graphs.frame_count)
    assert counts[0] < counts[1], "text of any length from the start is a slower graph for runs of one prompt"
    assert counts[1] == counts[2]
