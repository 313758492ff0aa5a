"""What draft attention did during a generation."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from draftattn.pipelines.video.steps import StepInfo


@dataclass(frozen=True)
class LayerCall:
    """One self-attention call.

    Args:
        transformer: name of the transformer in the pipeline.
        step: denoising step, None where it was not known.
        branch: guidance branch, None where it was not known.
        layer: number of the attention layer.
        sparse: False for warm-up steps and dense layers.
        density: share of scores computed, text included; 1.0 where dense.
        mask_seconds: time from queries and keys to the block mask; 0.0 where dense.
    """

    transformer: str
    step: int | None
    branch: str | None
    layer: int
    sparse: bool
    density: float
    mask_seconds: float


@dataclass(frozen=True)
class DraftStats:
    """The self-attention calls of the latest run, in order."""

    calls: Sequence[LayerCall]

    @property
    def num_sparse_calls(self) -> int:
        """Calls that ran on the block-sparse kernel."""
        return sum(call.sparse for call in self.calls)

    @property
    def density(self) -> float:
        """Mean realised density of the sparse calls; 1.0 if there were none."""
        return fmean([call.density for call in self.calls if call.sparse] or [1.0])

    @property
    def run_density(self) -> float:
        """Mean density of all self-attention calls, warm-up steps and dense layers included."""
        return fmean([call.density for call in self.calls] or [1.0])

    @property
    def mask_seconds(self) -> float:
        """Time spent making masks, summed over the run."""
        return sum(call.mask_seconds for call in self.calls)

    def by_step(self) -> dict[int | None, DraftStats]:
        """The calls of each denoising step."""
        return self._group(lambda call: call.step)

    def by_layer(self) -> dict[int, DraftStats]:
        """The calls of each attention layer."""
        return self._group(lambda call: call.layer)

    def _group(self, key: Callable[[LayerCall], Hashable]) -> dict:
        groups: dict[Hashable, list[LayerCall]] = defaultdict(list)
        for call in self.calls:
            groups[key(call)].append(call)
        return {name: DraftStats(calls) for name, calls in groups.items()}


class Stopwatch:
    """Measures a stretch of device work without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()
        self._end = self._start

    def stop(self) -> None:
        """Marks the end of the stretch."""
        self._end = self._now()

    @property
    def seconds(self) -> float:
        """Length of the stretch; waits for the device."""
        if isinstance(self._start, torch.cuda.Event):
            assert isinstance(self._end, torch.cuda.Event)
            self._end.synchronize()
            return self._start.elapsed_time(self._end) / 1000
        assert not isinstance(self._end, torch.cuda.Event)
        return self._end - self._start

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def named_range(name: str) -> AbstractContextManager[Any]:
    """A range that a running `torch.profiler.profile` shows under a name; nothing where none runs."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(name)


@dataclass(frozen=True)
class _Pending:
    transformer: str
    step: int | None
    branch: str | None
    layer: int
    density: Tensor | None
    watch: Stopwatch | None


class StatsRecorder:
    """Collects calls while a generation runs; reads nothing back from the device until asked."""

    def __init__(self) -> None:
        # Bounded for transformers called outside any run, whose beginning nothing tells.
        self._pending: deque[_Pending] = deque(maxlen=100_000)
        self._forwards: set[tuple[str, int, str]] = set()
        self._run: object = None

    def start_run(self) -> None:
        """Forgets the calls of the run before."""
        self._pending.clear()
        self._forwards.clear()

    def begin_forward(self, transformer: str, info: StepInfo) -> None:
        """Starts a new run if this forward cannot belong to the one so far: its step is behind, or was done."""
        step, branch = info.step, info.branch
        if info.run is not self._run:
            self.start_run()
            self._run = info.run
        if step is None:
            return
        last_step = self._pending[-1].step if self._pending else None
        if (last_step is not None and step < last_step) or (transformer, step, branch) in self._forwards:
            self.start_run()
        if branch is not None:  # forwards of unknown branches cannot be told apart
            self._forwards.add((transformer, step, branch))

    def record(
        self,
        transformer: str,
        step: int | None,
        branch: str | None,
        layer: int,
        density: Tensor | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        """Notes a call; ``density`` and ``watch`` are None where it was dense."""
        self._pending.append(_Pending(transformer, step, branch, layer, density, watch))

    def read(self) -> DraftStats:
        """The calls so far; waits for the device."""
        return DraftStats(
            [
                LayerCall(
                    transformer=call.transformer,
                    step=call.step,
                    branch=call.branch,
                    layer=call.layer,
                    sparse=call.density is not None,
                    density=1.0 if call.density is None else float(call.density),
                    mask_seconds=0.0 if call.watch is None else call.watch.seconds,
                )
                for call in self._pending
            ]
        )
