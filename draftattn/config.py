"""The settings of draft attention."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from draftattn.errors import InputError
from draftattn.kernels.backends import BackendName
from draftattn.kernels.dense import DenseBackend
from draftattn.layout import MAX_BLOCK_SIZE, validate_tile
from draftattn.policies import POLICY_NAMES, PolicyConfig

Selection = Literal["row", "head"]


@dataclass(frozen=True)
class DraftConfig:
    """What is computed and what is skipped.

    Args:
        sparsity: share of video block pairs **dropped** in a sparse layer, in [0, 1): 0.75 keeps a quarter.
        warmup: leading denoising steps that stay dense: a float in [0, 1] is a share of the steps (rounded up), an
            int a number of steps. 0 makes every step sparse.
        selection: how blocks are chosen from the draft map. ``"row"`` keeps the same number for every query block,
            its own among them; ``"head"`` is the published rule, one threshold over the flattened map of a head,
            under which a query block may keep many or none.
        residual: let skipped blocks contribute through their mean key and value. False is the published method.
        tile: largest extent of a block in ``(frames, height, width)`` tokens; None picks the within-frame tile that
            covers the frame with the fewest blocks (`draftattn.layout.choose_tile`).
        block_size: the most tokens a block holds, 16 to 128. 128 is the fastest on GPUs.
        dense_layers: layers that always stay dense, counted over all attention layers of the transformer; negative
            numbers count from the end.
        backend: the kernel, ``"auto"`` for the fastest that can serve.
        dense_backend: the kernel of warm-up steps and dense layers (`draftattn.kernels.dense.fastest_dense`);
            ``"torch"`` leaves them to the model's own. A backend set on the model with ``set_attention_backend`` wins.
        policy: how block pairs are chosen: a name of `draftattn.policies.POLICY_NAMES`, or that policy's own settings.
            ``selection`` belongs to ``"draft"``; the other fields hold for every policy.

    Raises:
        InputError: if a value is out of range; the message names it and what is allowed.

    >>> DraftConfig(sparsity=0.9, warmup=5).num_warmup_steps(50)
    5
    >>> DraftConfig(warmup=0.25).num_warmup_steps(50)
    13
    """

    sparsity: float = 0.75
    warmup: float | int = 0.25
    selection: Selection = "row"
    residual: bool = True
    tile: tuple[int, int, int] | None = None
    block_size: int = MAX_BLOCK_SIZE
    dense_layers: tuple[int, ...] = ()
    backend: BackendName = "auto"
    dense_backend: DenseBackend = "auto"
    policy: str | PolicyConfig = "draft"

    def __post_init__(self) -> None:
        if not _is_number(self.sparsity) or not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity is {self.sparsity!r}; it must be in [0, 1): the share of blocks dropped")
        most = 1.0 if isinstance(self.warmup, float) else math.inf
        if not _is_number(self.warmup) or not 0 <= self.warmup <= most:
            raise InputError(
                f"warmup is {self.warmup!r}; it must be a share of the steps in [0.0, 1.0] or a whole number of steps"
            )
        if self.selection not in get_args(Selection):
            raise InputError(f"selection is {self.selection!r}; choose from {', '.join(get_args(Selection))}")
        if not isinstance(self.block_size, int) or not 16 <= self.block_size <= MAX_BLOCK_SIZE:
            raise InputError(f"block_size is {self.block_size!r}; a block holds 16 to {MAX_BLOCK_SIZE} tokens")
        if self.backend not in get_args(BackendName):
            raise InputError(f"backend is {self.backend!r}; choose from {', '.join(get_args(BackendName))}")
        if self.dense_backend not in get_args(DenseBackend):
            raise InputError(
                f"dense_backend is {self.dense_backend!r}; choose from {', '.join(get_args(DenseBackend))}"
            )
        if isinstance(self.policy, str) and self.policy not in POLICY_NAMES:
            raise InputError(f"policy is {self.policy!r}; choose from {', '.join(POLICY_NAMES)}")
        if self.tile is not None:
            object.__setattr__(self, "tile", tuple(validate_tile(self.tile, self.block_size)))
        if not isinstance(self.dense_layers, Iterable) or not all(type(layer) is int for layer in self.dense_layers):
            raise InputError(f"dense_layers is {self.dense_layers!r}; it must hold layer numbers")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))

    def num_warmup_steps(self, num_steps: int) -> int:
        """Leading dense steps of a run of ``num_steps``."""
        if isinstance(self.warmup, int):
            return min(self.warmup, num_steps)
        return math.ceil(self.warmup * num_steps - 1e-9)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
