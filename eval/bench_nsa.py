"""Native Sparse Attention's forward pass against flash-linear-attention's and dense attention.

``python -m draftattn.eval.bench_nsa --tokens 65536`` prints the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from draftattn.errors import InputError
from draftattn.eval.dense_yardstick import dense_yardstick
from draftattn.eval.environment import device_name, package_versions
from draftattn.eval.kernel_timing import clocks_under_load, time_in_turns
from draftattn.files import check_writable, written_whole
from draftattn.kernels import reference
from draftattn.pipelines.llm.nsa_attention import nsa_attention
from draftattn.pipelines.llm.nsa_compressed_attention import attend_in_rows
from draftattn.pipelines.llm.nsa_compression import (
    count_compressed,
    make_compression,
    tokens_of,
    visible_compressed,
)
from draftattn.pipelines.llm.nsa_config import NSAConfig

GATE_TOKENS = 2048
FLA_PACKAGE = "flash-linear-attention"


@dataclass(frozen=True)
class NSAShape:
    """Sizes of one layer; flash-linear-attention wants 16 query heads or more to a key head, a power of two.

    Args:
        tokens: of the sequence.
        heads: query heads.
        kv_heads: key heads.
        head_dim: channels of a head.
    """

    tokens: int = 65536
    heads: int = 64
    kv_heads: int = 4
    head_dim: int = 128

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1 or self.heads % self.kv_heads:
            raise InputError(f"shape is {asdict(self)}; all must be at least 1, and kv_heads divide heads")


class NSAProblem:
    """Random inputs of one layer, and ways to compute it.

    Args:
        shape: sizes.
        dtype: of the tensors.
        device: where they are.
    """

    def __init__(self, shape: NSAShape, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device=device).manual_seed(0)

        def draw(heads: int, channels: int) -> Tensor:
            return torch.randn(1, shape.tokens, heads, channels, generator=generator, device=device, dtype=dtype)

        self.shape = shape
        self.query = draw(shape.heads, shape.head_dim)
        self.key, self.value = draw(shape.kv_heads, shape.head_dim), draw(shape.kv_heads, shape.head_dim)
        self.gates = draw(shape.heads, 3).sigmoid()

    def first(self, tokens: int) -> NSAProblem:
        """The same problem over the first tokens."""
        small = object.__new__(NSAProblem)
        small.shape = replace(self.shape, tokens=min(tokens, self.shape.tokens))
        for name in ("query", "key", "value", "gates"):
            setattr(small, name, getattr(self, name)[:, :tokens].contiguous())
        return small

    def ours(self, config: NSAConfig) -> Callable[[], Tensor]:
        """Compression, selection and all branches; the compression's rotary embedding is left out."""
        compressions = make_compression(self.shape.kv_heads, self.shape.head_dim, config)
        end = tokens_of(count_compressed(self.shape.tokens, config), config)
        key_compression, value_compression = (x.to(self.key) for x in compressions)

        @torch.no_grad()
        def run() -> Tensor:
            compressed = key_compression(self.key[:, :end]), value_compression(self.value[:, :end])
            return nsa_attention(self.query, self.key, self.value, *compressed, self.gates, config)[0]

        return run

    def fla(self, config: NSAConfig) -> Callable[[], Tensor]:
        """flash-linear-attention's Triton kernels, without its window, for which it wants another package.

        Raises:
            ImportError: if it is not installed.
        """
        from fla.ops.nsa import parallel_nsa

        compression, selection, _ = (x.contiguous() for x in self.gates.unbind(-1))

        @torch.no_grad()
        def run() -> Tensor:
            return parallel_nsa(
                self.query, self.key, self.value, compression, selection,
                block_counts=config.num_selected, block_size=config.block_size, window_size=0,
            )  # fmt: skip

        return run


@torch.no_grad()
def check(problem: NSAProblem, config: NSAConfig) -> dict[str, Any]:
    """Errors on the first tokens, against float64 with our choice of blocks; at most twice torch's own is green.

    ``fla_error`` is that of flash-linear-attention's Triton kernels, whose choice may differ where scores are nearly
    equal; None where it is not installed, or where the config is not of its form.
    """
    small = problem.first(GATE_TOKENS)
    exact_inputs = [x.double() for x in (small.query, small.key, small.value)]
    query, key, value = exact_inputs
    scale = problem.shape.head_dim**-0.5
    compressions = make_compression(problem.shape.kv_heads, problem.shape.head_dim, config)
    end = tokens_of(count_compressed(small.shape.tokens, config), config)
    compressed_key, compressed_value = (
        x.to(small.key)(y[:, :end]) for x, y in zip(compressions, (small.key, small.value), strict=True)
    )
    ours, mask = nsa_attention(
        small.query, small.key, small.value, compressed_key, compressed_value, small.gates, config
    )
    visible = visible_compressed(0, small.shape.tokens, config, query.device)
    selected, _ = reference.attention_forward(
        query, key, value, mask, scale=scale, causal=True, residual=None, return_lse=False
    )
    gates = small.gates.double()
    of_compressed = attend_in_rows(query, compressed_key.double(), compressed_value.double(), visible, scale)[0]
    exact = gates[..., :1] * of_compressed + gates[..., 1:2] * selected
    position = torch.arange(small.shape.tokens, device=query.device)
    if config.window:
        distance = position[:, None] - position
        near = (distance >= 0) & (distance < config.window)
        exact = exact + gates[..., 2:] * _masked(query, key, value, near)
    causal = position[:, None] >= position
    dense = _masked(query, key, value, causal)
    allowed = 2 * _relative_error(_masked(small.query, small.key, small.value, causal), dense)
    error = _relative_error(ours, exact)
    found: dict[str, Any] = {"error": error, "allowed": allowed, "green": error <= max(allowed, 1e-6)}
    if config.compression == "mean" and not config.window:
        try:
            found["fla_error"] = _relative_error(small.fla(config)(), exact)
        except (ImportError, RuntimeError, AssertionError) as reason:
            found["fla_error"], found["fla"] = (
                None,
                str(reason).splitlines()[0] if str(reason) else type(reason).__name__,
            )
    return found


def bench_nsa(
    shapes: Sequence[NSAShape],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = 0.5,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Times one forward pass of each contender, in turns, after a check of ours against float64.

    The contenders: ours in the form of flash-linear-attention without and with a window, ours in the paper's form,
    flash-linear-attention's Triton kernels without a window, dense attention.

    Returns:
        Rows of ``tokens`` and ``name`` with times in seconds and ``speedup`` over dense; ``gate`` with the errors.
    """
    mean = NSAConfig.mean_pooled()
    ours = {"ours, mean pooled, no window": replace(mean, window=0), "ours, mean pooled": mean, "ours": NSAConfig()}
    rows, gates, skipped = [], [], {}
    for shape in shapes:
        problem = NSAProblem(shape, dtype, device)
        calls = {"dense": dense_yardstick(problem.query, problem.key, problem.value)}
        for name, config in ours.items():
            on_progress(f"checking {name}, {shape.tokens} tokens")
            verdict = check(problem, config)
            gates.append({"tokens": shape.tokens, "name": name, **verdict})
            if verdict["green"]:
                calls[name] = problem.ours(config)
        try:
            call = problem.fla(replace(mean, window=0))
            call()
            calls[FLA_PACKAGE + ", no window"] = call
        except (ImportError, RuntimeError, AssertionError) as reason:
            skipped[FLA_PACKAGE] = f"{type(reason).__name__}: {reason}"
        on_progress(f"timing {shape.tokens} tokens")
        times = time_in_turns(calls, seconds, device)
        clocks = clocks_under_load(calls["dense"], times["dense"].median, device)
        for name, taken in times.items():
            speedup = times["dense"].median / taken.median
            rows.append({"tokens": shape.tokens, "name": name, "seconds": taken.to_json(), "speedup": speedup})
        del problem, calls
    versions = package_versions() | {FLA_PACKAGE: _version(FLA_PACKAGE)}
    return {
        "schema": 1,
        "kind": "nsa",
        "shapes": [asdict(shape) for shape in shapes],
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "versions": versions,
        "clocks": clocks,
        "gate": gates,
        "skipped": skipped,
        "rows": rows,
    }


def _masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel([SDPBackend.MATH]):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return out.transpose(1, 2)


def _relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs from a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="16384,65536", help="lengths, separated by commas")
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0.5, help="how long to time each contender")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.output is not None:
        check_writable(options.output)
    shapes = [
        NSAShape(int(tokens), options.heads, options.kv_heads, options.head_dim) for tokens in options.tokens.split(",")
    ]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result = bench_nsa(shapes, dtype=dtype, device=device, seconds=options.seconds, on_progress=print)
    for gate in result["gate"]:
        print(json.dumps(gate))
    for row in result["rows"]:
        print(f"{row['tokens']:>8}  {row['name']:<40} {1e3 * row['seconds']['median']:9.3f} ms  {row['speedup']:6.2f}x")
    if result["skipped"]:
        print(json.dumps(result["skipped"]))
    if options.output is not None:
        with written_whole(options.output) as path:
            path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
