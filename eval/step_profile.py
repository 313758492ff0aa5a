"""What the time of one forward pass goes to."""

from __future__ import annotations

import json
import re
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# Ranges that draft attention opens around its own work, and the parts they stand for.
RANGES = {
    "draftattn.permutation": "permutation",
    "draftattn.mask": "mask",
    "draftattn.attention": "attention",
    "draftattn.dense": "attention",
}
NESTING = 4  # ranges that may be open at once
PARTS = ("attention", "mask", "permutation", "cross-attention", "communication", "projections", "other", "host")
_ATTENTION = re.compile(r"flash|fmha|sdpa|scaled_dot_product", re.IGNORECASE)
_MATRIX = re.compile(
    r"gemm|cutlass|nvjet|cublas|xmma|splitk|aten::(addmm|mm|bmm|linear|matmul|convolution|mkldnn)", re.IGNORECASE
)
_EXCHANGE = re.compile(r"nccl|c10d|all_to_all|all_gather", re.IGNORECASE)
_FUSED = re.compile(r"^triton_(poi|red|per)_")  # torch.compile names what it fused after the operators before it


class Work(NamedTuple):
    """Something that took time: a GPU kernel, or on a CPU an operator without the ones inside it.

    Args:
        name: of the kernel or operator.
        seconds: how long it took.
        launched: when the host launched it.
        thread: the host's thread that did.
    """

    name: str
    seconds: float
    launched: float
    thread: Any


@dataclass(frozen=True)
class StepProfile:
    """Seconds of one forward pass by part; they sum to ``seconds``.

    Args:
        seconds: of the profiled pass, from the call to the end of its last kernel.
        parts: ``attention`` is the self-attention kernel, ``cross-attention`` every other one, ``mask`` the pooling,
            scores and selection, ``permutation`` the reordering of tokens at the two ends, ``communication`` the
            exchange between GPUs, ``projections`` all matrix products, ``other`` norms, rotary embedding, modulation,
            activations and copies, ``host`` the time in which the device had nothing to do.
    """

    seconds: float
    parts: dict[str, float]

    @property
    def overhead(self) -> float:
        """Share of the pass that masks and permutation take."""
        return (self.parts["mask"] + self.parts["permutation"]) / self.seconds


def profile_step(call: Callable[[], Any], device: torch.device) -> StepProfile:
    """Profiles one forward pass.

    Args:
        call: runs it.
        device: where it runs.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    complete = [event for event in events if event.get("ph") == "X"]
    return split(seconds, gpu_work(complete) if on_gpu else cpu_work(complete), ranges_of(complete))


def split(seconds: float, work: Iterable[Work], ranges: Sequence[Work]) -> StepProfile:
    """Adds up work by part.

    Args:
        seconds: of the whole pass; what the work leaves is the host's.
        work: what ran on the device.
        ranges: named stretches of the host's time.

    >>> ranges = [Work("draftattn.mask", 2.0, 1.0, 0)]
    >>> work = [Work("pool", 0.5, 1.5, 0), Work("gemm", 1.0, 4.0, 0), Work("gemm", 0.25, 2.5, 0)]
    >>> parts = split(2.0, work, ranges).parts
    >>> parts["mask"], parts["projections"], parts["host"]
    (0.75, 1.0, 0.25)
    """
    parts = dict.fromkeys(PARTS, 0.0)
    by_thread: dict[Any, list[Work]] = defaultdict(list)
    for named in sorted(ranges, key=lambda found: found.launched):
        by_thread[named.thread].append(named)
    starts = {thread: [named.launched for named in found] for thread, found in by_thread.items()}
    for item in work:
        found = by_thread.get(item.thread, [])
        begun = bisect_right(starts.get(item.thread, []), item.launched)
        # the innermost range is the latest to begin that has not ended
        enclosing = (
            RANGES[named.name]
            for named in reversed(found[max(0, begun - NESTING) : begun])
            if item.launched <= named.launched + named.seconds
        )
        parts[_part(item.name, next(enclosing, None))] += item.seconds
    parts["host"] = max(0.0, seconds - sum(parts.values()))
    return StepProfile(seconds, parts)


def _part(name: str, enclosing: str | None) -> str:
    if enclosing is not None:
        return enclosing
    if _FUSED.match(name):
        return "other"
    if _EXCHANGE.search(name):
        return "communication"
    if _ATTENTION.search(name):
        return "cross-attention"
    return "projections" if _MATRIX.search(name) else "other"


def gpu_work(events: list[dict[str, Any]]) -> Iterator[Work]:
    """Kernels and copies of a trace, each with the moment the host launched it."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launch = launches.get(event.get("args", {}).get("correlation"), {"ts": -1.0, "tid": None})
            yield Work(event["name"], event["dur"] / 1e6, launch["ts"] / 1e6, launch["tid"])


def cpu_work(events: list[dict[str, Any]]) -> Iterator[Work]:
    """Operators of a trace without the time of the operators inside them."""
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            by_thread[event["tid"]].append(event)
    for thread, found in by_thread.items():
        found.sort(key=lambda event: (event["ts"], -event["dur"]))
        own = [event["dur"] for event in found]
        open_operators: list[int] = []
        for i, event in enumerate(found):
            while open_operators and event["ts"] >= _end(found[open_operators[-1]]):
                open_operators.pop()
            if open_operators:
                own[open_operators[-1]] -= event["dur"]
            open_operators.append(i)
        for event, duration in zip(found, own, strict=True):
            yield Work(event["name"], max(0.0, duration) / 1e6, event["ts"] / 1e6, thread)


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def ranges_of(events: list[dict[str, Any]]) -> list[Work]:
    """The named ranges of a trace, as the host went through them."""
    return [
        Work(event["name"], event["dur"] / 1e6, event["ts"] / 1e6, event["tid"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in RANGES
    ]
