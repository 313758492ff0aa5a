"""Attention kernels that are measured against each other, ours and other people's, behind one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from draftattn.kernels import even_blocks, fa4, flex
from draftattn.kernels.api import BlockMeans, block_sparse_attention
from draftattn.kernels.backends import BackendName, reasons_against
from draftattn.kernels.block_mask import BlockMask

# Kernel options of FlexAttention that are tried before it is timed; the fastest that runs is taken.
FLEX_OPTIONS: dict[str, dict[str, Any]] = {
    "its defaults": {},
    "rows safe, prescaled": {"ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True},
    "rows safe, prescaled, TMA": {"ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True, "USE_TMA": True},
}


@dataclass(frozen=True)
class Problem:
    """One attention call on ``[B, S, H, D]`` tensors; no mask means dense."""

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    mask: BlockMask | None = None
    residual: BlockMeans | None = None

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.query.shape[-1] ** -0.5)


@dataclass(frozen=True)
class Contender:
    """A kernel that may take part.

    Args:
        name: what tables call it.
        reasons_against: every reason why it cannot serve a problem.
        prepare: makes the call to be timed; what it needs of a mask is built here, outside the time.
        ours: whether it is one of this repository's kernels.
    """

    name: str
    reasons_against: Callable[[Problem], list[str]]
    prepare: Callable[[Problem], Callable[[], Tensor]]
    ours: bool = False


def dense_contenders(device: torch.device) -> list[Contender]:
    """Dense attention, the yardstick first: cuDNN on a CUDA GPU, torch's own attention elsewhere."""
    if device.type != "cuda":
        return [Contender("torch", _never, lambda problem: _dense(problem, None))]
    return [
        Contender("cudnn", _never, lambda problem: _dense(problem, SDPBackend.CUDNN_ATTENTION)),
        Contender("torch-flash", _never, lambda problem: _dense(problem, SDPBackend.FLASH_ATTENTION)),
        Contender("fa4", _fa4_reasons, _fa4),
    ]


def sparse_contenders(device: torch.device, flex_options: dict[str, Any] | None = None) -> list[Contender]:
    """Block-sparse attention, ours first.

    Args:
        device: where it will run.
        flex_options: torch's ``kernel_options`` for FlexAttention.
    """
    if device.type != "cuda":
        return [_ours("cpu")]
    return [
        _ours("hopper"),
        _ours("triton"),
        flex_contender(flex_options),
        Contender("fa4", _fa4_reasons, _fa4),
    ]


def flex_contender(options: dict[str, Any] | None = None) -> Contender:
    """FlexAttention, compiled, with the kernel options given."""
    return Contender("flex", _flex_reasons, lambda problem: _flex(problem, options))


def _never(problem: Problem) -> list[str]:
    return []


def _dense(problem: Problem, backend: SDPBackend | None) -> Callable[[], Tensor]:
    query, key, value = (x.transpose(1, 2) for x in (problem.query, problem.key, problem.value))
    shared = query.shape[1] != key.shape[1]

    def call() -> Tensor:
        options: dict[str, Any] = {"is_causal": problem.causal, "scale": problem.scale, "enable_gqa": shared}
        if backend is None:
            return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

    if shared:
        try:
            call()
        except RuntimeError:
            # a backend that knows no grouped heads gets copies, made outside the time
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
            shared = False
    return call


def _ours(backend: BackendName) -> Contender:
    def reasons(problem: Problem) -> list[str]:
        return reasons_against(backend, problem.query, problem.key, problem.value, problem.residual, _the_mask(problem))

    def prepare(problem: Problem) -> Callable[[], Tensor]:
        mask = _the_mask(problem)
        return lambda: block_sparse_attention(
            problem.query,
            problem.key,
            problem.value,
            mask,
            scale=problem.scale,
            causal=problem.causal,
            residual=problem.residual,
            backend=backend,
        )

    return Contender(backend, reasons, prepare, ours=True)


def _the_mask(problem: Problem) -> BlockMask:
    assert problem.mask is not None
    return problem.mask


def _flex_reasons(problem: Problem) -> list[str]:
    reasons = flex.reasons_against_flex(problem.query, problem.key, problem.value)
    return [*reasons, "its residual is not measured"] if problem.residual is not None else reasons


def _flex(problem: Problem, options: dict[str, Any] | None) -> Callable[[], Tensor]:
    mask = _the_mask(problem)
    lengths = problem.query.shape[1], problem.key.shape[1]
    even = problem.query.is_cuda and not even_blocks.reasons_against_even(mask, *lengths)
    build = flex.even_mask if even else flex.ragged_mask
    torch_mask = build(
        mask,
        query_length=lengths[0],
        key_length=lengths[1],
        heads=problem.query.shape[2],
        causal=problem.causal,
        transposed=problem.query.requires_grad,
    )
    return lambda: flex.run(
        problem.query, problem.key, problem.value, torch_mask, scale=problem.scale, options=options
    )[0]


def _fa4_reasons(problem: Problem) -> list[str]:
    return fa4.reasons_against_fa4(problem.query, problem.key, problem.value, problem.residual, problem.mask)


def _fa4(problem: Problem) -> Callable[[], Tensor]:
    lists = None
    if problem.mask is not None:
        lists = even_blocks.tile_lists(problem.mask, problem.query.shape[1], problem.key.shape[1], problem.causal)
        lists = even_blocks.for_each_head(lists, problem.query.shape[2])
    options: dict[str, Any] = {"scale": problem.scale, "causal": problem.causal, "return_lse": False}
    return lambda: fa4.tile_attention(problem.query, problem.key, problem.value, lists, **options)[0]
