"""The gate before any time is taken: a kernel may err at most twice as much as torch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from draftattn.eval.kernel_contenders import Contender, Problem
from draftattn.eval.kernel_shapes import KernelShape, random_mask
from draftattn.kernels.api import BlockMeans
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.reference import attention_forward

DENSITY = 0.4
FLOOR = 1e-6  # of fp32 kernels, which may add in another order than torch


@dataclass(frozen=True)
class Verdict:
    """What the gate found: relative errors (Frobenius) of the output, or of the worst gradient, against float64."""

    kernel: str
    case: str
    error: float
    allowed: float
    failure: str | None = None

    @property
    def green(self) -> bool:
        """Whether the kernel may be timed."""
        return self.failure is None and self.error <= self.allowed

    def to_json(self) -> dict[str, Any]:
        """What is written to a file."""
        finite = self.error == self.error and self.error != float("inf")
        error = float(f"{self.error:.3g}") if finite else None
        found = {"kernel": self.kernel, "case": self.case, "error": error, "allowed": float(f"{self.allowed:.3g}")}
        return {**found, "green": self.green, "failure": self.failure}


def make_problem(
    shape: KernelShape, mask: BlockMask | None, dtype: torch.dtype, device: torch.device, *, gradient: bool = False
) -> Problem:
    """Normal random tensors, seeded, for a shape."""
    generator = torch.Generator(device=device).manual_seed(shape.tokens)

    def random(heads: int) -> Tensor:
        size = (1, shape.tokens, heads, shape.head_dim)
        x = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return x.requires_grad_(gradient)

    return Problem(random(shape.heads), random(shape.kv_heads), random(shape.kv_heads), shape.causal, mask)


def check(
    contenders: list[Contender],
    shape: KernelShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dense: bool = False,
    gradient: bool = False,
    with_means: Callable[[Problem], Problem] | None = None,
) -> list[Verdict]:
    """Compares contenders with float64 on a small shape of the kind; those that cannot serve it are left out.

    Args:
        contenders: to be checked.
        shape: what will be timed.
        dtype: of the tensors.
        device: where to run.
        dense: without a mask.
        gradient: the gradients of query, key and value instead of the output.
        with_means: adds the residual to the problem.
    """
    small = shape.small()
    mask = None if dense else random_mask(small, DENSITY, device, rows="uneven" if shape.real_blocks else "even")
    problem = make_problem(small, mask, dtype, device, gradient=gradient)
    if with_means is not None:
        problem = with_means(problem)
    every = mask or random_mask(small, 1.0, device)
    case = (
        "gradient" if gradient else "residual" if with_means else "dense" if dense else "sparse"
    ) + f", {small.name}"

    upstream = torch.randn(problem.query.shape, generator=torch.Generator().manual_seed(1))

    def results(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        if not gradient:
            return [output]
        return list(torch.autograd.grad(output, inputs, upstream.to(output)))

    def same_in(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Problem]:
        tensors = [x.detach().to(device, dtype) for x in (problem.query, problem.key, problem.value)]
        query, key, value = (x.requires_grad_(gradient) for x in tensors)
        means = problem.residual and BlockMeans(*(x.to(device, dtype) for x in problem.residual))
        return [query, key, value], Problem(query, key, value, problem.causal, every.to(device), means)

    tensors, wide = same_in(torch.float64, device)
    options: dict[str, Any] = {"scale": wide.scale, "causal": wide.causal, "residual": wide.residual}
    output, _ = attention_forward(wide.query, wide.key, wide.value, every, **options, return_lse=False)
    expected = results(output, tensors)
    # on the CPU, where torch's fused attention takes any mask
    tensors, own = same_in(dtype, torch.device("cpu"))
    rounded = results(_torch_attention(own), tensors)
    allowed = 2 * max(_error(x.to(device), y) for x, y in zip(rounded, expected, strict=True))
    allowed += FLOOR if dtype == torch.float32 else 0.0

    verdicts = []
    for contender in contenders:
        if contender.reasons_against(problem):
            continue
        try:
            found = results(contender.prepare(problem)(), [problem.query, problem.key, problem.value])
            error = max(_error(x, y) for x, y in zip(found, expected, strict=True))
            verdicts.append(Verdict(contender.name, case, error, allowed))
        except Exception as failure:  # any other people's kernel may raise anything; it is then not timed
            text = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            verdicts.append(Verdict(contender.name, case, float("inf"), allowed, text))
    return verdicts


def _torch_attention(problem: Problem) -> Tensor:
    """Torch's attention over the mask's token pairs, the means as more keys.

    The additive mask is float32, so that only torch's arithmetic is rounded.
    """
    mask = problem.mask
    assert mask is not None
    key, value = problem.key, problem.value
    seen = mask.to_dense()[None]
    token = torch.arange(seen.shape[-2])[:, None]
    if problem.causal:
        seen = seen & (torch.arange(seen.shape[-1]) <= token)
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    if problem.residual is not None:
        key, value = (torch.cat(x, dim=1) for x in zip((key, value), problem.residual, strict=True))
        skipped = ~mask.block_map.repeat_interleave(mask.query_offsets.diff().long(), dim=2)
        if problem.causal:
            skipped = skipped & (mask.key_offsets[1:] <= token + 1)
        weight = mask.key_offsets.diff().float().log()
        bias = torch.cat([bias, torch.where(skipped, weight, -torch.inf)], dim=-1)
    query, key, value = (x.transpose(1, 2) for x in (problem.query, key, value))
    options: dict[str, Any] = {"scale": problem.scale, "enable_gqa": query.shape[1] != key.shape[1]}
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, **options).transpose(1, 2)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))
