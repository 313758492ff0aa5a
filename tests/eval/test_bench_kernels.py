import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from draftattn.cli import main
from draftattn.errors import InputError
from draftattn.eval import bench_kernels as bench_module
from draftattn.eval.bench_kernels import BenchSettings, bench_kernels
from draftattn.eval.kernel_contenders import Contender, Problem, dense_contenders, sparse_contenders
from draftattn.eval.kernel_gate import check
from draftattn.eval.kernel_shapes import KERNEL_SHAPES, KernelShape, computed_pairs, kernel_shape, random_mask
from draftattn.eval.kernel_timing import ROUNDS, time_in_turns
from draftattn.eval.plot_kernels import plot_kernels
from draftattn.layout import TokenGrid

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = KernelShape("small", heads=2, kv_heads=2, tokens=640, head_dim=32)
CAUSAL = replace(SMALL, name="causal", heads=4, causal=True)
RAGGED = KernelShape("ragged", 2, 2, 1, 32, grid=TokenGrid(2, 20, 21), num_text_tokens=100).with_real_blocks()
QUICK = BenchSettings(densities=(1.0, 0.4), seconds=1e-3, residual=True, backward=True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["draftattn", "bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code if isinstance(stop.value.code, int) else 0


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench_kernels([SMALL, CAUSAL, RAGGED], QUICK, torch.float32, CPU)


def test_every_row_says_what_was_measured(result: dict[str, Any]) -> None:
    assert result["red"] == []
    assert result["versions"]["torch"]
    json.dumps(result, allow_nan=False)
    for measured, shape in zip(result["shapes"], (SMALL, CAUSAL, RAGGED), strict=True):
        assert measured["shape"]["tokens"] == shape.tokens
        assert measured["shape"]["dtype"] == "float32"
        assert {verdict["case"].split(",")[0] for verdict in measured["gate"]} == {
            "dense", "sparse", "residual", "gradient"
        }  # fmt: skip
        kinds = {row["kind"] for row in measured["rows"]}
        expected = {"dense", "sparse", "residual", "dense backward", "backward"}
        assert kinds == expected if shape.causal else expected | {"mask"}
        for row in measured["rows"]:
            times = row["seconds"]
            assert 0 < times["min"] <= times["median"] <= times["max"]
            assert times["calls"] == len(times["all"]) >= 3


def test_rates_and_ratios_follow_their_formulas(result: dict[str, Any]) -> None:
    for measured, shape in zip(result["shapes"], (SMALL, CAUSAL, RAGGED), strict=True):
        rows = {(row["kind"], round(row["density"], 1)): row for row in measured["rows"]}
        dense, sparse = rows["dense", 1.0], rows["sparse", 1.0]
        pairs = shape.tokens * (shape.tokens + 1) / 2 if shape.causal else shape.tokens**2
        operations = 4 * shape.head_dim * shape.heads * pairs
        assert dense["tflops"] == pytest.approx(operations / dense["seconds"]["median"] / 1e12, rel=1e-2)
        speedup = dense["seconds"]["median"] / sparse["seconds"]["median"]
        assert sparse["speedup_over_dense"] == pytest.approx(speedup, rel=1e-2, abs=1e-3)
        backward = rows["backward", 1.0]
        assert backward["tflops"] == pytest.approx(2.5 * operations / backward["seconds"]["median"] / 1e12, rel=1e-2)
        residual = next(row for row in measured["rows"] if row["kind"] == "residual")
        assert residual["density"] < 1
        assert residual["time_over_plain"] > 0
        if not shape.causal:
            assert all(row["share_of_kernel"] > 0 for row in measured["rows"] if row["kind"] == "mask")


def wrong(problem: Problem) -> Any:
    portable = next(kernel for kernel in sparse_contenders(DEVICE) if kernel.name in ("triton", "cpu"))
    call = portable.prepare(problem)
    return lambda: call() * 1.05


def crash(problem: Problem) -> Any:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(("prepare", "word"), [(wrong, "allowed"), (crash, "no such instruction")])
def test_a_wrong_kernel_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, prepare: Any, word: str
) -> None:
    contenders = [*sparse_contenders(DEVICE), Contender("wrong", lambda problem: [], prepare, ours=True)]
    monkeypatch.setattr(bench_module, "sparse_contenders", lambda *args: contenders)
    output = tmp_path / "kernels.json"
    options = ["--heads", "2", "--tokens", "512", "--head-dim", "32", "--densities", "0.5", "--seconds", "0.001"]
    assert run(monkeypatch, "kernels", *options, "--no-masks", "--output", str(output)) == 1
    shown = capsys.readouterr()
    assert "wrong results, not timed: wrong" in shown.err
    assert word in shown.out
    found = json.loads(output.read_text())
    assert found["red"] == ["wrong"]
    timed = {row["kernel"] for row in found["shapes"][0]["rows"]}
    assert "wrong" not in timed
    assert timed >= {dense_contenders(DEVICE)[0].name, "cpu" if DEVICE.type == "cpu" else "triton"}


def test_the_gate_sees_a_missing_block() -> None:
    def one_block_less(problem: Problem) -> Any:
        mask = problem.mask
        assert mask is not None
        fewer = replace(mask, kv_num_blocks=(mask.kv_num_blocks - 1).clamp(min=1))
        return sparse_contenders(CPU)[0].prepare(replace(problem, mask=fewer))

    contenders = [*sparse_contenders(CPU), Contender("sloppy", lambda problem: [], one_block_less)]
    for shape in (SMALL, CAUSAL, RAGGED):
        with torch.no_grad():
            verdicts = {x.kernel: x for x in check(contenders, shape, torch.float32, CPU)}
        assert verdicts["cpu"].green
        assert not verdicts["sloppy"].green


def test_a_kernel_that_cannot_serve_says_why() -> None:
    settings = BenchSettings(densities=(0.5,), seconds=1e-3, mask_road=False)
    picky = Contender("picky", lambda problem: ["it is Tuesday"], crash)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_module, "sparse_contenders", lambda *args: [picky])
        found = bench_kernels([SMALL], settings, torch.float32, CPU)
    assert found["red"] == []
    assert found["shapes"][0]["rows"][-1]["reasons"] == ["it is Tuesday"]


def test_calls_take_turns() -> None:
    order: list[str] = []
    times = time_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 1e-4, CPU)
    # each in every round, though in an order that is drawn anew
    assert sum(x != y for x, y in pairwise(order)) >= ROUNDS
    assert all(3 <= len(x.seconds) <= 400 for x in times.values())


@pytest.mark.parametrize("shape", [SMALL, CAUSAL, RAGGED], ids=lambda shape: shape.name)
@pytest.mark.parametrize("rows", ["even", "uneven"])
def test_random_masks(shape: KernelShape, rows: Any) -> None:
    shape = replace(shape, tokens=4096) if not shape.real_blocks else shape
    mask = random_mask(shape, 0.3, CPU, rows=rows)
    num_video_blocks = shape.layout().num_video_blocks
    block_map = mask.block_map[..., :num_video_blocks, :num_video_blocks]
    assert mask.kv_indices.shape[-1] == mask.num_key_blocks
    assert block_map.diagonal(dim1=-2, dim2=-1).all()
    visible = torch.ones(num_video_blocks, num_video_blocks)
    visible = visible.tril() if shape.causal else visible
    assert not block_map[..., visible == 0].any()
    assert float(block_map.sum() / (visible.sum() * shape.heads)) == pytest.approx(0.3, abs=0.05)
    counts = block_map.sum(-1)
    if rows == "even":
        assert torch.equal(counts, counts[:, :1].expand_as(counts))
        assert torch.equal(counts[0, 0], (0.3 * visible.sum(-1)).round().clamp(min=1).long())
    else:
        assert len(counts.unique()) > 3
    assert mask.block_map[..., num_video_blocks:].all()
    assert mask.block_map[..., num_video_blocks:, :].all()
    assert not torch.equal(mask.block_map, random_mask(shape, 0.3, CPU, rows=rows, seed=1).block_map)


@pytest.mark.parametrize("shape", [SMALL, CAUSAL, replace(CAUSAL, tokens=600), RAGGED], ids=str)
def test_computed_pairs_counts_tokens(shape: KernelShape) -> None:
    mask = random_mask(shape, 0.4, CPU)
    dense = mask.to_dense()
    every = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool)
    if shape.causal:
        every = every.tril()
    assert computed_pairs(mask, shape.heads, shape.causal) == (
        int((dense & every).sum()),
        int(every.sum()) * shape.heads,
    )


def test_named_shapes() -> None:
    assert KERNEL_SHAPES["hunyuan-720p"].tokens == 118_784
    assert KERNEL_SHAPES["hunyuan-720p"].with_real_blocks().tokens == 118_800 + 256
    for shape in KERNEL_SHAPES.values():
        assert shape.tokens % 128 == 0
        assert shape.small().heads * shape.kv_heads == shape.heads * shape.small().kv_heads
        assert shape.small().tokens <= 2048
    with pytest.raises(InputError, match="comes from no video; real blocks exist for wan"):
        kernel_shape("llm-32k").with_real_blocks()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "wan"], ["shape is 'wan'", "wan-1.3b-480p", "llm-128k"]),
        (["--densities", "1,1.5"], ["density is 1.5", "above 0 and at most 1"]),
        (["--densities", "0"], ["density is 0.0"]),
        (["--densities", ","], ["densities are empty"]),
        (["--densities", "half"], ["densities is 'half'"]),
        (["--heads", "3"], ["--heads and --tokens together"]),
        (["--heads", "3", "--tokens", "512", "--shape", "cpu-4k"], ["either --shape or"]),
        (["--heads", "3", "--tokens", "512", "--kv-heads", "2"], ["3 heads cannot share 2 kv-heads"]),
        (["--heads", "3", "--tokens", "0"], ["tokens is 0"]),
        (["--heads", "3", "--tokens", "512", "--blocks", "real"], ["comes from no video"]),
        (["--heads", "3", "--tokens", "512", "--kernel", "fast"], ["kernel is 'fast'", "torch, cpu"]),
        (["--seconds", "0"], ["seconds is 0.0"]),
        (["--plot", "picture.gif"], ["picture.gif", ".svg"]),
        (["--output", "/proc/none/kernels.json"], ["cannot be written"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, "kernels", *options) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("draftattn: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_gpu_shape_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, "kernels", "--shape", "cpu-4k,hunyuan-720p") == 2
    assert "'hunyuan-720p' is for a GPU and torch sees none" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_plot_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: dict[str, Any], ending: str) -> None:
    pytest.importorskip("matplotlib")
    source, picture = tmp_path / "kernels.json", tmp_path / f"kernels.{ending}"
    source.write_text(json.dumps(result))
    assert run(monkeypatch, "plot", str(source), str(picture)) == 0
    content = picture.read_bytes()
    assert len(content) > 5000
    assert content.startswith(b"<?xml" if ending == "svg" else b"\x89PNG")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: dict[str, Any]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot_kernels(result, tmp_path / "kernels.svg")


@pytest.mark.parametrize("content", ["{}", "no json", '{"schema": 99}'])
def test_plot_of_something_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str
) -> None:
    pytest.importorskip("matplotlib")
    source = tmp_path / "other.json"
    source.write_text(content)
    assert run(monkeypatch, "plot", str(source), str(tmp_path / "kernels.svg")) == 2
    assert "other.json" in capsys.readouterr().err
    assert not (tmp_path / "kernels.svg").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    shape = KernelShape("small", heads=4, kv_heads=2, tokens=2048)
    device = torch.device("cuda")
    found = bench_kernels([shape], BenchSettings(densities=(1.0, 0.25), seconds=5e-3), torch.bfloat16, device)
    assert found["red"] == []
    timed = {row["kernel"] for row in found["shapes"][0]["rows"] if "seconds" in row}
    assert {"cudnn", "torch-flash", "triton", "flex"} <= timed
    assert dense_contenders(device)[0].name == "cudnn"
