"""Muon: momentum whose matrices are made orthogonal before they are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Coefficients of a Newton-Schulz iteration that moves all singular values near 1 in five rounds.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor, rounds: int = 5) -> Tensor:
    """The nearest half-orthogonal matrix of each ``[count, rows, columns]``, to within some 20 %, without an SVD."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024) with Nesterov momentum and decoupled weight decay, for matrices only.

    Updates are scaled by ``0.2 sqrt(max(rows, columns))`` to the size of AdamW's (arXiv 2502.16982, eq. 4), so that
    learning rates mean the same. Unlike ``torch.optim.Muon`` it takes all matrices of one shape in one batch, which
    for a hundred small matrices is a handful of launches instead of some thousand.

    Args:
        params: two-dimensional parameters.
        lr: learning rate.
        momentum: share of the past in the running mean of gradients.
        weight_decay: decoupled decay.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                self._update(parameters, 0.2 * max(shape) ** 0.5, group)

    def _update(self, parameters: list[Tensor], scale: float, group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        means = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, means, group["momentum"]))
        # the iteration forgives the rounding of bfloat16, and CPUs are slow at it
        update = orthogonalised(ahead.bfloat16() if ahead.is_cuda else ahead).float()
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(update.unbind()), alpha=-group["lr"] * scale)
