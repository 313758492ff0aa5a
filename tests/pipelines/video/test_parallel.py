"""Several processes: one video on two devices, and many prompts shared between them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from draftattn import InputError
from draftattn.cli.processes import Processes, join_processes
from draftattn.pipelines.video.hunyuan_video import HunyuanVideoAdapter
from draftattn.pipelines.video.parallel import check_spread, ulysses
from draftattn.pipelines.video.wan import WanAdapter

CPU = torch.device("cpu")
WORKERS = 2
TIMEOUT = 240
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def folder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left that ran `parallel_worker`."""
    folder = tmp_path_factory.mktemp("parallel")
    tiny.wan_pipeline().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("a red cup\nhands\na dog\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, here / "parallel_worker.py", folder],
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
                **{"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORKERS)
    ]
    try:
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, err[-3000:]
            (folder / f"out-{rank}.txt").write_text(out)
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module", params=range(WORKERS), ids=lambda rank: f"process {rank}")
def results(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads((folder / f"results-{request.param}.json").read_text())


@pytest.mark.parametrize("case", ["enabled last", "enabled first", "timestep per token", "compiled"])
def test_two_devices_make_what_one_makes(results: dict[str, Any], case: str) -> None:
    assert results[case]["to one device"] < ROUNDING


def test_that_is_not_the_dense_result_unless_all_layers_are_dense(results: dict[str, Any]) -> None:
    assert results["enabled last"]["to dense"] > 1e-3
    assert results["dense layers"]["to dense"] < ROUNDING


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("tokens", "the video has 105 tokens, which ulysses_degree=2 does not divide; set ulysses_anything=True"),
        ("heads", "3 heads cannot be shared by ulysses_degree=2"),
        ("ring", "ring_degree=2; ring attention shows a device one part of the keys at a time"),
        ("text", "its video and text tokens share a sequence"),
        ("gradients", "runs without gradients"),
    ],
)
def test_what_cannot_work_is_refused(results: dict[str, Any], case: str, words: str) -> None:
    assert words in results["refusals"][case]


def test_prompts_are_shared_and_every_video_is_written_once(folder: Path, results: dict[str, Any]) -> None:
    assert results["commands"]["generate"] == 0
    names = ["video-000.mp4", "video-001.mp4", "video-002.mp4"]
    assert sorted(path.name for path in (folder / "videos").iterdir()) == names
    first, second = ((folder / f"out-{rank}.txt").read_text() for rank in range(WORKERS))
    assert "Loading" in first
    assert "a red cup" in first
    assert "a dog" in first
    assert "hands" not in first
    assert not second.strip()


def test_a_study_is_shared_and_its_results_are_whole(folder: Path, results: dict[str, Any]) -> None:
    assert results["commands"]["compare"] == 0
    rows = [json.loads(line) for line in (folder / "study" / "results.jsonl").read_text().splitlines()]
    assert sorted((row["prompt"], row["sparsity"]) for row in rows) == [(p, s) for p in range(3) for s in (0.5, 0.9)]
    assert (folder / "study" / "report.html").is_file()


class TestProcesses:
    @pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
    def test_every_item_falls_to_exactly_one(self, count: int) -> None:
        items = list(range(5))
        shares = [Processes(index, count, CPU).share(items) for index in range(count)]
        assert sorted(item for share in shares for item in share) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

    def test_without_a_launcher_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        processes = join_processes(CPU)
        assert processes == Processes(0, 1, CPU)
        assert processes.is_main
        assert not torch.distributed.is_initialized()

    @pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
    def test_numbers_out_of_range(self, index: int, count: int) -> None:
        with pytest.raises(InputError, match=f"process {index} of {count}"):
            Processes(index, count, CPU)


class TestSpreading:
    def test_refused_before_loading(self) -> None:
        with pytest.raises(InputError, match="there is one; start them with torchrun --nproc-per-node N"):
            check_spread(WanAdapter(), 1, torch.device("cuda"))
        with pytest.raises(InputError, match=r"no plan to spread HunyuanVideoTransformer3DModel, whose video and text"):
            check_spread(HunyuanVideoAdapter(), 2, torch.device("cuda"))
        with pytest.raises(InputError, match="needs a GPU for each process; this one is on cpu"):
            check_spread(WanAdapter(), 2, CPU)
        check_spread(WanAdapter(), 2, torch.device("cuda"))

    @pytest.mark.parametrize(
        ("heads", "tokens", "degree", "uneven"),
        [(12, 32760, 2, False), (12, 32760, 4, False), (12, 32760, 8, True), (40, 75600, 8, False), (40, 105, 2, True)],
    )
    def test_uneven_shares_only_where_needed(self, heads: int, tokens: int, degree: int, uneven: bool) -> None:
        assert ulysses(heads, tokens, degree).ulysses_anything is uneven
