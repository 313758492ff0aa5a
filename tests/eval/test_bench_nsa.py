"""The benchmark of Native Sparse Attention, on a problem too small to time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from draftattn.errors import InputError
from draftattn.eval import bench_nsa as module
from draftattn.eval.bench_nsa import NSAProblem, NSAShape, bench_nsa, check
from draftattn.pipelines.llm.nsa_config import NSAConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = NSAShape(tokens=200, heads=16, kv_heads=1, head_dim=32)


def test_rows_and_gates() -> None:
    result = bench_nsa([SHAPE], dtype=torch.float32, device=DEVICE, seconds=0.001)
    names = [row["name"] for row in result["rows"]]
    assert names[:4] == ["dense", "ours, mean pooled, no window", "ours, mean pooled", "ours"]
    assert all(row["seconds"]["median"] > 0 for row in result["rows"])
    assert len(result["gate"]) == 3
    assert all(gate["green"] for gate in result["gate"])


@pytest.mark.parametrize("broken", ["compressed", "selected", "window"])
def test_a_wrong_branch_turns_the_gate_red(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, config = NSAProblem(SHAPE, torch.float32, DEVICE), replace(NSAConfig(), num_selected=4, window=50)
    assert check(problem, config)["green"]
    right = module.nsa_attention

    def wrong(*arguments: Any) -> Any:
        *others, gates, config = arguments
        gates = gates.clone()
        gates[..., ["compressed", "selected", "window"].index(broken)] *= 1.01
        return right(*others, gates, config)

    monkeypatch.setattr(module, "nsa_attention", wrong)
    assert not check(problem, config)["green"]


def test_shapes_that_are_none() -> None:
    with pytest.raises(InputError, match="kv_heads divide heads"):
        NSAShape(heads=6, kv_heads=4)
