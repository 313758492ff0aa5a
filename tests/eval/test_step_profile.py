"""Kernels find their way to the parts of a step."""

from __future__ import annotations

from typing import Any

import pytest

from draftattn.eval.step_profile import cpu_work, gpu_work, ranges_of, split


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None, tid: int = 1) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def launched(correlation: int, at: float, kernel: str, dur: float, tid: int = 1) -> list[dict[str, Any]]:
    """A kernel that runs long after the host launched it."""
    return [
        event("cuda_runtime", "cudaLaunchKernel", at, 2, correlation, tid),
        event("kernel", kernel, at + 5000, dur, correlation, tid=7),
    ]


def test_kernels_belong_to_the_range_that_launched_them() -> None:
    events = [
        event("user_annotation", "draftattn.mask", 100, 50),
        event("user_annotation", "draftattn.attention", 160, 20),
        event("user_annotation", "draftattn.permutation", 300, 20),
        event("user_annotation", "draftattn.dense", 400, 20),
        event("user_annotation", "somebody's own", 90, 1000),
        *launched(1, 110, "cutlass_gemm", 1e5),
        *launched(2, 149, "pool_kernel", 2e5),
        *launched(3, 155, "elementwise", 3e5),
        *launched(4, 165, "hopper_attention", 4e5),
        *launched(5, 310, "gather", 5e5),
        *launched(6, 405, "cudnn_flash_fprop", 6e5),
        *launched(7, 500, "cudnn_generated_fort_native_sdpa_flash", 7e5),
        *launched(8, 510, "nvjet_hsh_256x128", 8e5),
        *launched(9, 520, "triton_poi_fused_addmm_gelu_3", 9e5),
        *launched(10, 120, "on another thread", 1e6, tid=2),
        event("gpu_memcpy", "Memcpy DtoD", 9000, 1.1e6, 99),
    ]
    profile = split(20.0, gpu_work(events), ranges_of(events))
    expected = {
        "mask": 0.3, "attention": 1.0, "permutation": 0.5, "cross-attention": 0.7, "projections": 0.8,
        "other": 0.3 + 0.9 + 1.0 + 1.1,
    }  # fmt: skip
    for part, seconds in expected.items():
        assert profile.parts[part] == pytest.approx(seconds), part
    assert sum(profile.parts.values()) == pytest.approx(20.0)
    assert profile.overhead == pytest.approx(0.8 / 20)


def test_an_operator_has_the_time_that_the_ones_inside_it_leave() -> None:
    events = [
        event("cpu_op", "aten::linear", 0, 100),
        event("cpu_op", "aten::addmm", 10, 60),
        event("cpu_op", "aten::copy_", 20, 15),
        event("cpu_op", "aten::gelu", 100, 30),
        event("cpu_op", "aten::mm", 5, 10, tid=2),
    ]
    work = {(item.thread, item.name): item.seconds * 1e6 for item in cpu_work(events)}
    assert work == pytest.approx(
        {(1, "aten::linear"): 40, (1, "aten::addmm"): 45, (1, "aten::copy_"): 15, (1, "aten::gelu"): 30,
         (2, "aten::mm"): 10}
    )  # fmt: skip
