"""The training loop: a budget of time or iterations, a schedule that ends with it, console lines, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from draftattn.errors import InputError

from .state import TrainingState


@dataclass(frozen=True)
class Budget:
    """How long a training may take: minutes, counted over all runs, or a number of iterations.

    Raises:
        InputError: unless one of the two is given and positive.
    """

    minutes: float | None = None
    iterations: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.minutes, self.iterations) if value is not None]
        if len(given) != 1 or given[0] <= 0:
            raise InputError(
                f"a budget is positive minutes or positive iterations; got minutes={self.minutes}, "
                f"iterations={self.iterations}"
            )

    def share(self, step: int, elapsed: float) -> float:
        """Share of the budget that is spent.

        >>> Budget(minutes=2).share(step=10, elapsed=30.0)
        0.25
        >>> Budget(iterations=20).share(step=10, elapsed=30.0)
        0.5
        """
        return step / self.iterations if self.iterations else elapsed / (60 * (self.minutes or math.inf))


def schedule(share: float, warmup: float, decay_start: float) -> float:
    """Factor of the learning rate: up in the first ``warmup`` of the budget, level, and from ``decay_start`` linearly
    to zero at its end.

    >>> [schedule(share, warmup=0.1, decay_start=0.5) for share in (0.05, 0.3, 0.75, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if share < warmup:
        return share / warmup
    return max(0.0, min(1.0, (1 - share) / (1 - decay_start)))


def run_loop(
    name: str,
    state: TrainingState,
    budget: Budget,
    step: Callable[[float], Tensor],
    checkpoint: Path,
    *,
    seconds_between_lines: float = 5.0,
    seconds_between_checkpoints: float = 60.0,
) -> None:
    """Calls ``step`` until the budget is spent.

    Args:
        name: begins each console line.
        state: continued from ``checkpoint`` if that exists.
        budget: share and end.
        step: one iteration, given the share of the budget spent; returns its loss, on the device. The loop waits for
            the device only when it writes a line.
        checkpoint: where the state is written, now and then and at the end.

    Raises:
        FloatingPointError: if the loss is no longer finite; the last checkpoint stays.
    """
    if state.load(checkpoint):
        print(f"{name}: continues at iteration {state.step:,} after {state.elapsed:.0f} s", flush=True)
    before = state.elapsed
    began = line_at = checkpoint_at = time.monotonic()
    losses: list[Tensor] = []
    while (share := budget.share(state.step, state.elapsed)) < 1:
        losses.append(step(share))
        state.step += 1
        now = time.monotonic()
        state.elapsed = before + now - began
        if now - line_at >= seconds_between_lines:
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise FloatingPointError(f"{name}: loss is {mean} at iteration {state.step}")
            now = time.monotonic()
            state.elapsed = before + now - began
            state.curve.append((state.step, round(state.elapsed, 1), round(mean, 5)))
            print(_line(name, state, budget, mean, len(losses) / (now - line_at)), flush=True)
            losses, line_at = [], now
        if now - checkpoint_at >= seconds_between_checkpoints:
            state.save(checkpoint)
            checkpoint_at = time.monotonic()
    if losses:
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"{name}: loss is {mean} at iteration {state.step}")
        state.curve.append((state.step, round(state.elapsed, 1), round(mean, 5)))
        state.save(checkpoint)
        print(_line(name, state, budget, mean, state.step / max(state.elapsed, 1e-9)), flush=True)


def _line(name: str, state: TrainingState, budget: Budget, loss: float, rate: float) -> str:
    share = budget.share(state.step, state.elapsed)
    left = state.elapsed * (1 - share) / share if share else math.inf
    return f"{name}: iteration {state.step:,}, loss {loss:.4f}, {rate:.2f} it/s, {share:4.0%} done, {left:.0f} s left"
