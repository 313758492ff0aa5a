"""Times of several calls taken in turns, each at the clock that it leaves a warm card."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

ROUNDS = 5
MAX_CALLS = 400
SETTLE_SECONDS = 0.1


@dataclass(frozen=True)
class Times:
    """Times of one call, in seconds, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Their median."""
        return median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """What is written to a file."""
        digits = [float(f"{x:.5g}") for x in self.seconds]
        return {"median": median(digits), "min": min(digits), "max": max(digits), "calls": len(digits), "all": digits}


def time_in_turns(calls: Mapping[str, Callable[[], Any]], seconds: float, device: torch.device) -> dict[str, Times]:
    """Times calls in rounds, a few of each in turn, in another order in every round.

    Every call runs twice untimed (once if it takes longer than ``seconds``). The number of timed calls is what fits
    into ``seconds``, at least 3 and at most 400. On a GPU, 0.1 s of untimed calls come before each turn: a card at its
    power limit lowers its clock for the kernel that draws most, and the next one would pay for it. There each call is
    timed by a pair of CUDA events in the stream, so the time the host needs to launch it does not count while the GPU
    is busy with the ones before. The L2 cache is not flushed: caches hold what the call before left in them.

    Args:
        calls: by name.
        seconds: how long to time each call in all.
        device: where they run.
    """
    counts = {}
    settling = {}
    for name, call in calls.items():
        call()
        estimate = _time_one_by_one(call, 1, device)[0]
        if estimate < seconds:
            estimate = _time_one_by_one(call, 1, device)[0]
        counts[name] = max(3, min(MAX_CALLS, round(seconds / max(estimate, 1e-6))))
        settling[name] = min(MAX_CALLS, int(SETTLE_SECONDS / max(estimate, 1e-6))) if device.type == "cuda" else 0
    order = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            call = calls[name]
            # as equal shares as whole numbers allow
            share = (i + 1) * counts[name] // ROUNDS - i * counts[name] // ROUNDS
            if share:
                for _ in range(settling[name]):
                    call()
                taken[name] += _time_one_by_one(call, share, device)
    return {name: Times(tuple(values)) for name, values in taken.items()}


def _time_one_by_one(call: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    if device.type != "cuda":
        found = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]
    torch.cuda.synchronize(device)
    # the GPU is kept busy while the host launches the first call
    torch.cuda._sleep(2_000_000)
    for i in range(count):
        events[2 * i].record()
        call()
        events[2 * i + 1].record()
    torch.cuda.synchronize(device)
    return [events[2 * i].elapsed_time(events[2 * i + 1]) / 1e3 for i in range(count)]


def clocks_under_load(call: Callable[[], Any], call_seconds: float, device: torch.device) -> dict[str, float] | None:
    """What ``nvidia-smi`` says while a call runs again and again; None where there is no such program.

    Returns:
        ``sm_mhz``, ``power_w``, ``power_limit_w`` and ``temperature_c``.
    """
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        return None
    fields = ("clocks.sm", "power.draw", "power.limit", "temperature.gpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    for _ in range(max(1, min(2000, round(0.8 / call_seconds)))):
        call()
    # a card chosen by CUDA_VISIBLE_DEVICES has another index for nvidia-smi
    card = str(getattr(torch.cuda.get_device_properties(index), "uuid", index))
    card = card if card.isdigit() else f"GPU-{card.removeprefix('GPU-')}"
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={card}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        values = [float(x) for x in answer.strip().split(",")]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    finally:
        torch.cuda.synchronize(device)
    return dict(zip(("sm_mhz", "power_w", "power_limit_w", "temperature_c"), values, strict=True))
