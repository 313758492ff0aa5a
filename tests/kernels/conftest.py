"""Cases of block-sparse attention, and the one rule by which every backend is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from draftattn.kernels.api import BlockMeans, block_sparse_attention
from draftattn.kernels.block_mask import BlockMask, SlidingWindow
from draftattn.kernels.pooling import pool_blocks_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Spec:
    """One case. Lengths in ``query_blocks`` and ``key_blocks`` are tokens per block."""

    name: str
    query_blocks: tuple[int, ...]
    key_blocks: tuple[int, ...] | None = None  # as the query's if None
    block_size: int = 64
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    density: float = 0.5
    mask_batch: int = 1
    mask_heads: int = 1
    causal: bool = False
    residual: bool = False
    lse: bool = False
    transposed: bool = False
    key_offsets_per_item: bool = False
    uncovered: tuple[int, int] = (0, 0)  # tokens before the first and after the last block
    empty_row: bool = True
    scale: float | None = None
    query_block_size: int | None = None
    shifts: str = ""  # query_shifts per "block", or per batch "item" and block
    window: int | None = None
    sink: int = 0
    whole: bool = False  # some chosen blocks are exempt from the window
    starts: bool = False  # every query block has a sequence start of its own


@dataclass(frozen=True)
class Case:
    """Tensors of a spec."""

    spec: Spec
    query: Tensor
    key: Tensor
    value: Tensor
    mask: BlockMask
    residual: BlockMeans | None

    def run(self, backend: str, **changes: object) -> tuple[Tensor, Tensor]:
        options = dict(causal=self.spec.causal, residual=self.residual, scale=self.spec.scale, return_lse=True)
        result = block_sparse_attention(
            self.query, self.key, self.value, self.mask, backend=backend, **(options | changes)
        )
        return result if isinstance(result, tuple) else (result, None)

    def shift_of(self, item: int, block: int) -> int:
        """What turns a query's index into its position among the keys."""
        shifts = self.mask.query_shifts
        if shifts is None:
            return self.key.shape[1] - self.query.shape[1]
        return int(torch.atleast_2d(shifts)[item if shifts.ndim == 2 else 0, block])

    def start_of(self, item: int, block: int) -> int:
        """The first key of a query block's sequence."""
        starts = self.mask.key_offsets[..., :1] if self.mask.window.starts is None else self.mask.window.starts
        row = torch.atleast_2d(starts)[item if starts.ndim == 2 else 0]
        return int(row[block if len(row) > 1 else 0])

    def to(self, dtype: torch.dtype, device: str | torch.device) -> Case:
        """The same numbers elsewhere."""
        move = dict(device=device, dtype=dtype)
        mask = self.mask.to(device)
        residual = None if self.residual is None else BlockMeans(*(x.to(**move) for x in self.residual))
        return Case(self.spec, self.query.to(**move), self.key.to(**move), self.value.to(**move), mask, residual)


RAGGED = (37, 64, 0, 1, 50, 48)  # 200 tokens
ODD = (63, 48)  # 111 tokens
ALL = Spec("all", RAGGED, dtype=torch.bfloat16, residual=True, causal=True, lse=True, kv_heads=1, mask_heads=2)

SPECS = [
    Spec("even", (64, 64, 64)),
    Spec("dense", (64, 64, 64), density=2.0, empty_row=False, heads=4),
    Spec("dense-causal", (64, 64, 63), density=2.0, empty_row=False, causal=True, kv_heads=1),
    Spec("ragged-lse", RAGGED, lse=True),
    Spec("blocks-of-112", (112, 112), block_size=128, residual=True),
    Spec("blocks-of-8", (8, 8, 8, 5, 8, 2, 8, 8), block_size=8, residual=True, lse=True),
    Spec("rectangular-63x111", (32, 31), ODD, lse=True),
    Spec("rectangular-causal-63x111", (32, 31), ODD, causal=True, lse=True, density=2.0, empty_row=False),
    Spec("rectangular-causal-111x63", ODD, (32, 31), causal=True, lse=True, density=2.0, empty_row=False),
    Spec("rectangular-causal-residual", (32, 31), RAGGED, causal=True, residual=True, mask_heads=2),
    Spec("batch3-mask-per-item-and-head-gqa", RAGGED, batch=3, heads=4, mask_batch=3, mask_heads=4),
    Spec("batch2-mask-per-item", ODD, batch=2, mask_batch=2),
    Spec("mqa-mask-per-head", ODD, heads=3, kv_heads=1, mask_heads=3, residual=True),
    Spec("residual-ragged-lse", RAGGED, residual=True, lse=True, density=0.3),
    Spec("residual-only", (64, 20), density=0.0, residual=True, lse=True),
    Spec("residual-causal", RAGGED, residual=True, causal=True, lse=True, density=0.3),
    Spec("nothing", (64, 20), density=0.0, lse=True),
    Spec(
        "key-offsets-per-item", ODD, RAGGED, batch=3, mask_batch=3, key_offsets_per_item=True, residual=True, lse=True
    ),
    Spec("uncovered-tokens", RAGGED, batch=2, uncovered=(3, 70), lse=True, residual=True),
    Spec("transposed-strides", RAGGED, batch=2, heads=4, transposed=True, residual=True),
    Spec("negative-scale", ODD, scale=-0.3, lse=True),
    Spec("zero-scale", ODD, scale=0.0, lse=True),
    ALL,
    replace(ALL, name="all-fp16", dtype=torch.float16),
    Spec("mask-per-key-head", RAGGED, batch=2, heads=4, kv_heads=2, mask_heads=2, lse=True, residual=True),
    Spec("shifts", (32, 31), RAGGED, batch=2, causal=True, shifts="block", lse=True, density=2.0, residual=True),
    Spec("shifts-per-item", (32, 31), RAGGED, batch=2, causal=True, shifts="item", lse=True, density=2.0),
    Spec("window", RAGGED, causal=True, window=40, lse=True, density=2.0, heads=4),
    Spec("window-not-causal", RAGGED, window=40, density=2.0),
    Spec("window-sink", RAGGED, causal=True, window=33, sink=5, lse=True, density=2.0, batch=2, uncovered=(3, 9)),
    Spec("window-sink-whole", RAGGED, causal=True, window=9, sink=40, whole=True, lse=True, density=1.0, mask_heads=2),
    Spec("window-starts-shifts", RAGGED, causal=True, window=20, sink=4, starts=True, shifts="item", batch=2, lse=True),
    Spec("window-residual", RAGGED, causal=True, window=20, sink=4, residual=True, density=0.4, whole=True, lse=True),
    Spec(
        "small-query-blocks",
        (1, 3, 4, 4, 0, 4),
        RAGGED,
        query_block_size=4,
        heads=6,
        kv_heads=2,
        mask_heads=2,
        causal=True,
        lse=True,
        density=1.0,
        shifts="block",
    ),
    Spec(
        "decode", (1,), RAGGED, query_block_size=1, batch=2, heads=4, kv_heads=1, density=2.0, empty_row=False, lse=True
    ),
    Spec(
        "decode-window",
        (1,),
        RAGGED,
        query_block_size=1,
        batch=2,
        heads=4,
        causal=True,
        density=2.0,
        empty_row=False,
        lse=True,
        key_offsets_per_item=True,
        window=90,
        sink=4,
        dtype=torch.float16,
    ),
    Spec("bf16", RAGGED, dtype=torch.bfloat16, heads=4),
    Spec("fp16", RAGGED, dtype=torch.float16, lse=True),
    Spec("head-dim-16", ODD, head_dim=16),
    Spec("head-dim-64", ODD, head_dim=64, dtype=torch.float16),
    Spec("head-dim-80", ODD, head_dim=80, dtype=torch.bfloat16, residual=True),
    Spec("head-dim-96", ODD, head_dim=96, residual=True),
    Spec("head-dim-128", (128, 97), block_size=128, head_dim=128, dtype=torch.bfloat16, heads=1, kv_heads=1, lse=True),
    Spec("head-dim-128-fp32", ODD, head_dim=128, heads=1, kv_heads=1),
    Spec("head-dim-256", (65, 100), block_size=128, head_dim=256, dtype=torch.bfloat16, density=2.0, lse=True),
    Spec("head-dim-256-fp32", ODD, head_dim=256, heads=1, kv_heads=1),
]


def make_case(spec: Spec, device: str = DEVICE) -> Case:
    """Random tensors for a spec; NaN in every token outside the blocks."""
    generator = torch.Generator().manual_seed(sum(map(ord, spec.name)))
    before, after = spec.uncovered
    key_blocks = spec.query_blocks if spec.key_blocks is None else spec.key_blocks

    def offsets_of(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([before, *lengths]).cumsum(0).int()

    query_offsets, key_offsets = offsets_of(spec.query_blocks), offsets_of(key_blocks)
    query_length, key_length = int(query_offsets[-1]) + after, int(key_offsets[-1]) + after
    if spec.key_offsets_per_item:
        # later items hold fewer keys, in other places
        key_offsets = torch.stack([(key_offsets - 7 * i).clamp(min=3 * i) for i in range(spec.batch)])

    shape = (spec.mask_batch, spec.mask_heads, len(spec.query_blocks), len(key_blocks))
    chances = spec.density * (0.5 + torch.rand(*shape[:3], 1, generator=generator))
    block_map = torch.rand(shape, generator=generator) < chances
    if spec.empty_row:
        block_map[:, :, 0] = False
    assert bool(block_map.any()) == (spec.density > 0), f"{spec.name} tests nothing: change its density"

    def tokens(length: int, heads: int, offsets: Tensor) -> Tensor:
        if spec.transposed:
            x = torch.randn(spec.batch, heads, length, spec.head_dim, generator=generator).transpose(1, 2)
        else:
            x = torch.randn(spec.batch, length, heads, spec.head_dim, generator=generator)
        position = torch.arange(length)
        offsets = torch.atleast_2d(offsets)
        inside = (position >= offsets[:, :1]) & (position < offsets[:, -1:])
        return x.masked_fill_(~inside[..., None, None], torch.nan).to(device, spec.dtype)

    query = tokens(query_length, spec.heads, query_offsets)
    key, value = (tokens(key_length, spec.kv_heads, key_offsets) for _ in range(2))
    query_offsets, key_offsets = query_offsets.to(device), key_offsets.to(device)
    mask = BlockMask.from_block_map(
        block_map.to(device), query_offsets, key_offsets, spec.block_size, query_block_size=spec.query_block_size
    )
    blocks = len(spec.query_blocks)
    if spec.shifts:
        shape = (blocks,) if spec.shifts == "block" else (spec.batch, blocks)
        shifts = key_length - query_length - torch.randint(-20, 20, shape, generator=generator).int()
        mask = replace(mask, query_shifts=shifts.to(device))
    if spec.window is not None:
        whole = starts = None
        if spec.whole:
            whole = (torch.rand(mask.kv_indices.shape, generator=generator) < 0.5).to(device)
        if spec.starts:
            starts = torch.randint(before, key_length // 2, (blocks,), generator=generator).int().to(device)
        mask = replace(mask, window=SlidingWindow(spec.window, spec.sink, whole, starts))
    residual = None
    if spec.residual:
        residual = BlockMeans(*(pool_blocks_reference(x, key_offsets).to(spec.dtype) for x in (key, value)))
    return Case(spec, query, key, value, mask, residual)


def torch_attention(case: Case, reference_lse: Tensor) -> Tensor:
    """What torch's own attention makes of the case in its dtype, on the CPU; zeros for rows that see nothing.

    The additive mask is float32, and the means are more keys, so that only torch's arithmetic is rounded.
    """
    case = case.to(case.spec.dtype, "cpu")
    query, key, value = (x.nan_to_num(0.0).transpose(1, 2) for x in (case.query, case.key, case.value))
    batch, heads, query_length, _ = query.shape
    bias = torch.full((batch, heads, query_length, key.shape[2]), -torch.inf)
    mean_bias = torch.full((batch, heads, query_length, case.mask.num_key_blocks), -torch.inf)
    block_map, whole_map = (
        x.repeat_interleave(heads // x.shape[1], 1).expand(batch, heads, -1, -1)
        for x in (case.mask.block_map, case.mask.whole_map)
    )
    for item in range(batch):
        key_offsets = torch.atleast_2d(case.mask.key_offsets)[item if case.mask.key_offsets.ndim == 2 else 0].tolist()
        for i, (q0, q1) in enumerate(pairwise(case.mask.query_offsets.tolist())):
            position = torch.arange(q0, q1)[:, None] + case.shift_of(item, i)
            for j, (k0, k1) in enumerate(pairwise(key_offsets)):
                columns = torch.arange(k0, k1)
                chosen = block_map[item, :, i, j, None, None]
                seen = (columns <= position) | (not case.spec.causal)
                if case.spec.window is not None:
                    near = columns > position - case.spec.window
                    sink = columns < case.start_of(item, i) + case.spec.sink
                    seen = seen & (near | sink | whole_map[item, :, i, j, None, None])
                bias[item, :, q0:q1, k0:k1] = torch.where(chosen & seen, 0.0, -torch.inf)
                if k1 > k0:
                    whole = (k1 <= position[:, 0] + 1) | (not case.spec.causal)
                    log_count = torch.tensor(float(k1 - k0)).log()
                    mean_bias[item, :, q0:q1, j] = torch.where(~chosen[..., 0] & whole, log_count, -torch.inf)
    if case.residual is not None:
        key = torch.cat([key, case.residual.key.transpose(1, 2)], dim=2)
        value = torch.cat([value, case.residual.value.transpose(1, 2)], dim=2)
        bias = torch.cat([bias, mean_bias], dim=-1)
    blind = (reference_lse == -torch.inf).cpu()
    bias = bias.masked_fill(blind[..., None], 0.0)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=case.spec.scale, enable_gqa=True)
    return out.masked_fill(blind[..., None], 0.0).transpose(1, 2)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    difference = (x.double().cpu() - reference.double().cpu()).norm()
    return float(difference / reference.double().norm().clamp(min=1e-30))


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@pytest.fixture(name="make_case")
def _make_case() -> Callable[..., Case]:
    return lambda **options: make_case(Spec("made", **options))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def judge() -> Callable[[Case, Tensor, Tensor | None], None]:
    """Fails unless a result errs at most twice as much as torch's own attention in that dtype, against float64."""

    def judge(case: Case, out: Tensor, lse: Tensor | None = None) -> None:
        spec = case.spec
        exact, exact_lse = (x.cpu() for x in case.to(torch.float64, case.query.device).run("reference"))
        assert out.dtype == spec.dtype
        assert out.shape == case.query.shape
        floor = 1e-6 if spec.dtype == torch.float32 else 0.0
        error = relative_error(out, exact)
        allowed = 2 * relative_error(torch_attention(case, exact_lse), exact) + floor
        assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
        blind = exact_lse == -torch.inf
        assert not out.cpu().transpose(1, 2)[blind].any()
        if lse is not None:
            assert lse.dtype == torch.float32
            assert torch.equal(lse.cpu() == -torch.inf, blind)
            torch.testing.assert_close(lse.cpu()[~blind], exact_lse[~blind], rtol=2e-5, atol=2e-5)

    return judge


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that what a backend forgets to write shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: object, **kwargs: object) -> Tensor:
            x = make(*args, **kwargs)
            poison = torch.nan if x.is_floating_point() else 2**30 if x.dtype == torch.int32 else 1
            with torch.no_grad():  # torch's compiler makes some that require a gradient
                return x.fill_(poison)

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def compile_ahead() -> Callable[[str, list[str]], list[dict[str, Any]]]:
    """Compiles kernels for GPUs that need not be there: a line of results of a ``compile_*.py`` script for each job."""

    def run(script: str, jobs: list[str]) -> list[dict[str, Any]]:
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *jobs]
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert len(lines) >= len(jobs)
        return lines

    return run
