"""Which denoising step a transformer is in."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

_MISSING = object()


@dataclass(frozen=True)
class StepInfo:
    """Step, number of steps, guidance branch and an object that is another for every run; None where not known."""

    step: int | None = None
    num_steps: int | None = None
    branch: str | None = None
    run: object = None


class StepClock:
    """Reads the step from what pipelines announce, never by counting calls.

    Newer pipelines announce step and branch through ``transformer.cache_context``; for the others the scheduler of
    the pipeline knows the step.
    """

    def __init__(self, transformer: nn.Module, pipeline: Any | None) -> None:
        self._transformer = weakref.ref(transformer)
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else lambda: None
        self._announced = StepInfo()
        self._listener: Any = _MISSING

    def install(self) -> None:
        """Starts to listen to ``cache_context``: the instance's attribute shadows the method and calls it."""
        transformer = self._transformer()
        if transformer is None or not hasattr(type(transformer), "cache_context"):
            return
        reference, clock = self._transformer, self
        original: Any = type(transformer).cache_context  # type: ignore[attr-defined]

        @contextmanager
        def cache_context(name: str, **details: Any) -> Iterator[None]:
            clock._announced = StepInfo(details.get("step_index"), details.get("num_inference_steps"), name)
            try:
                inner = reference()
                assert inner is not None
                with original(inner, name, **details):
                    yield
            finally:
                clock._announced = StepInfo()

        self._listener = transformer.__dict__["cache_context"] = cache_context

    def remove(self) -> None:
        """Stops listening."""
        transformer = self._transformer()
        # a later clock may have taken the place
        if transformer is not None and transformer.__dict__.get("cache_context") is self._listener:
            transformer.__dict__.pop("cache_context", None)

    def read(self) -> StepInfo:
        """Where the current forward call stands."""
        pipeline = self._pipeline()
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        # schedulers make new timesteps for every run
        announced = replace(self._announced, run=timesteps)
        if (announced.step is not None and announced.num_steps is not None) or scheduler is None or timesteps is None:
            return announced
        num_steps = getattr(pipeline, "_num_timesteps", None) or len(timesteps)
        step: Any = getattr(scheduler, "step_index", _MISSING)
        if step is None:  # before the first scheduler.step of a run
            return replace(announced, step=0, num_steps=num_steps)
        if step is not _MISSING:
            return replace(announced, step=int(step) - (scheduler.begin_index or 0), num_steps=num_steps)
        current = getattr(pipeline, "_current_timestep", None)
        if current is None:
            return announced
        matches = (timesteps == current).nonzero()
        return replace(announced, step=int(matches[0]) if len(matches) else None, num_steps=num_steps)
