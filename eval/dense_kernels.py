"""Dense attention kernels measured against each other at the shapes of one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftattn.eval.kernel_timing import time_in_turns
from draftattn.kernels.dense import DenseBackend, choose_dense, fastest_dense, reasons_against_dense

CANDIDATES: tuple[DenseBackend, ...] = ("torch", "cudnn", "flash", "hopper", "fa4")
CPU_CANDIDATES: tuple[DenseBackend, ...] = ("torch",)
# A kernel that computes the same may differ by roundings of the output and of the probabilities.
MAX_ROUNDINGS = 8


class Shape(NamedTuple):
    """One attention call: tokens of query and of key, heads, head_dim."""

    queries: int
    keys: int
    heads: int
    head_dim: int


@torch.inference_mode()
def measure_dense(shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> dict[str, Any]:
    """Times every dense kernel that can serve a shape, and checks each against torch's attention.

    Args:
        shape: of the call; the batch is 1.
        dtype: precision.
        device: where to run.
        seconds: how long to time each kernel; at least three calls.

    Returns:
        ``rows``: for each kernel the median seconds and the error against torch's, or the reasons why it did not run.
        ``fastest``: the name of the fastest correct one. ``auto``: what the product takes.
    """
    generator = torch.Generator(device).manual_seed(0)

    def noise(tokens: int) -> Tensor:
        size = (1, tokens, shape.heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    query, key, value = noise(shape.queries), noise(shape.keys), noise(shape.keys)
    expected = fastest_dense(query, key, value, backend="torch")
    allowed = MAX_ROUNDINGS * torch.finfo(dtype).eps
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for backend in CANDIDATES if device.type == "cuda" else CPU_CANDIDATES:
        reasons = reasons_against_dense(backend, query, key, value)
        if not reasons:
            try:
                output = fastest_dense(query, key, value, backend=backend)
            except Exception as error:  # other people's kernels raise what they like; the row says it
                reasons = [f"{type(error).__name__}: {error}".strip().splitlines()[0]]
        if reasons:
            rows[backend] = {"reasons": reasons}
            continue
        difference = relative_error(output, expected)
        del output
        rows[backend] = {"relative_error": difference}
        if not difference <= allowed:
            rows[backend]["reasons"] = [f"relative error {difference:.1e} is more than {allowed:.1e}"]
            continue
        calls[backend] = _call(query, key, value, backend)
    del expected
    times = time_in_turns(calls, seconds, device)
    for name, found in times.items():
        rows[name]["seconds"] = found.median
    return {
        "shape": shape._asdict(),
        "rows": [{"kernel": name, **row} for name, row in rows.items()],
        "fastest": min(times, key=lambda name: times[name].median),
        "auto": choose_dense(query, key, value),
    }


def _call(query: Tensor, key: Tensor, value: Tensor, backend: DenseBackend) -> Any:
    return lambda: fastest_dense(query, key, value, backend=backend)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float32 chunks to spare memory."""
    difference = norm = 0.0
    for a, b in zip(actual.flatten().split(2**26), expected.flatten().split(2**26), strict=True):
        difference += float((a.float() - b.float()).square().sum(dtype=torch.float64))
        norm += float(b.float().square().sum(dtype=torch.float64))
    return (difference / norm) ** 0.5 if norm else float(difference > 0)
