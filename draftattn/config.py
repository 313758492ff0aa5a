"""The settings of draft attention."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Literal, get_args

from draftattn.errors import InputError
from draftattn.kernels.backends import BackendName
from draftattn.kernels.dense import DenseBackend
from draftattn.layout import MAX_BLOCK_SIZE, TileRule, validate_rule, validate_tile
from draftattn.policies import POLICY_NAMES, PolicyConfig, policy_settings
from draftattn.schedule import SparsitySchedule, growing_sparsity

Selection = Literal["row", "head"]
DraftKeys = Literal["means", "tokens"]

_LEAST_USEFUL_SPARSITY = 0.2  # HunyuanVideo at 720p breaks even at 0.25


@dataclass(frozen=True)
class DraftConfig:
    """What is computed and what is skipped.

    Args:
        sparsity: share of video block pairs **dropped** in a sparse layer, in [0, 1): 0.75 keeps a quarter.
        warmup: leading denoising steps that stay dense: a float in [0, 1] is a share of the steps (rounded up), an
            int a number of steps. 0 makes every step sparse.
        growth: how fast sparsity grows over the sparse steps: a step's density is proportional to its place in the run
            to the power of ``-growth``, and ``sparsity`` is the mean (`draftattn.schedule.growing_sparsity`). 0 gives
            every step the same, as published. Where the step is not known, sparsity does not grow. Steps that are left
            with less than 0.2 are dense.
        selection: how blocks are chosen from the draft map. ``"row"`` keeps the same number for every query block,
            its own among them; ``"head"`` is the published rule, one threshold over the flattened map of a head,
            under which a query block may keep many or none.
        draft_keys: what the mean queries of the draft are compared with: ``"means"``, the mean keys, as published, or
            ``"tokens"``, every key, which gives the exact attention mass of each mean query
            (`draftattn.draft.draft_masses`) for 1/256 of the work of dense attention.
        residual: let skipped blocks contribute through their mean key and value. False is the published method.
        weighted_means: means of the residual in which a token counts as much as the call's mean query would attend to
            it (`draftattn.inputs.AttentionInputs.weighted_means`); False takes plain means.
        tile: largest extent of a block in ``(frames, height, width)`` tokens, or a rule that picks it for the size:
            ``"frame"`` the within-frame tile with the fewest blocks (`draftattn.layout.choose_tile`),
            ``"space-time"`` one of two to four frames (`draftattn.layout.choose_space_time_tile`), and ``"auto"`` the
            latter wherever the model lets tokens of different frames change places, the former elsewhere.
        block_size: the most tokens a block holds, 16 to 128. 128 is the fastest on GPUs.
        dense_layers: layers that always stay dense, counted over all attention layers of the transformer; negative
            numbers count from the end.
        backend: the kernel, ``"auto"`` for the fastest that can serve.
        dense_backend: the kernel of warm-up steps and dense layers (`draftattn.kernels.dense.fastest_dense`);
            ``"torch"`` leaves them to the model's own. A backend set on the model with ``set_attention_backend`` wins.
        policy: how block pairs are chosen: a name of `draftattn.policies.POLICY_NAMES`, or that policy's own settings.
            ``selection`` and ``growth`` belong to ``"draft"``; the other fields hold for every policy.
        schedule: sparsity by layer and by step, in place of ``sparsity`` and ``growth``: a
            `draftattn.schedule.SparsitySchedule`, or the path of a file that ``draftattn calibrate`` wrote. Not for
            policies that keep a share of the mass, such as ``"xattention"``, whose density nothing sets beforehand.

    Raises:
        InputError: if a value is out of range; the message names it and what is allowed.

    >>> DraftConfig(sparsity=0.9, warmup=5).num_warmup_steps(50)
    5
    >>> DraftConfig(warmup=0.25).num_warmup_steps(50)
    13
    """

    sparsity: float = 0.75
    warmup: float | int = 0.25
    growth: float = 0.6
    selection: Selection = "row"
    draft_keys: DraftKeys = "means"
    residual: bool = True
    weighted_means: bool = True
    tile: tuple[int, int, int] | TileRule = "auto"
    block_size: int = MAX_BLOCK_SIZE
    dense_layers: tuple[int, ...] = ()
    backend: BackendName = "auto"
    dense_backend: DenseBackend = "auto"
    policy: str | PolicyConfig = "draft"
    schedule: SparsitySchedule | str | Path | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.sparsity) or not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity is {self.sparsity!r}; it must be in [0, 1): the share of blocks dropped")
        most = 1.0 if isinstance(self.warmup, float) else math.inf
        if not _is_number(self.warmup) or not 0 <= self.warmup <= most:
            raise InputError(
                f"warmup is {self.warmup!r}; it must be a share of the steps in [0.0, 1.0] or a whole number of steps"
            )
        if not _is_number(self.growth) or not 0 <= self.growth <= 2:
            raise InputError(f"growth is {self.growth!r}; it must be in [0, 2], 0 for a sparsity that does not grow")
        if self.selection not in get_args(Selection):
            raise InputError(f"selection is {self.selection!r}; choose from {', '.join(get_args(Selection))}")
        if self.draft_keys not in get_args(DraftKeys):
            raise InputError(f"draft_keys is {self.draft_keys!r}; choose from {', '.join(get_args(DraftKeys))}")
        if not isinstance(self.block_size, int) or not 16 <= self.block_size <= MAX_BLOCK_SIZE:
            raise InputError(f"block_size is {self.block_size!r}; a block holds 16 to {MAX_BLOCK_SIZE} tokens")
        if self.backend not in get_args(BackendName):
            raise InputError(f"backend is {self.backend!r}; choose from {', '.join(get_args(BackendName))}")
        if self.dense_backend not in get_args(DenseBackend):
            raise InputError(
                f"dense_backend is {self.dense_backend!r}; choose from {', '.join(get_args(DenseBackend))}"
            )
        named = isinstance(self.policy, str) and self.policy in POLICY_NAMES
        if not named and (isinstance(self.policy, str) or not callable(getattr(self.policy, "make", None))):
            raise InputError(
                f"policy is {self.policy!r}; choose from {', '.join(POLICY_NAMES)}, or give a policy's own settings"
            )
        if isinstance(self.tile, str):
            validate_rule(self.tile)
        else:
            object.__setattr__(self, "tile", tuple(validate_tile(self.tile, self.block_size)))
        if not isinstance(self.dense_layers, Iterable) or not all(type(layer) is int for layer in self.dense_layers):
            raise InputError(f"dense_layers is {self.dense_layers!r}; it must hold layer numbers")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if isinstance(self.schedule, (str, Path)):
            object.__setattr__(self, "schedule", SparsitySchedule.load(self.schedule))
        elif not isinstance(self.schedule, (SparsitySchedule, type(None))):
            raise InputError(f"schedule is {self.schedule!r}; give a SparsitySchedule or the path of its file")
        if self.schedule is not None:
            settings = policy_settings(self.policy) if isinstance(self.policy, str) else self.policy
            if settings is not None and settings.matched_by != "sparsity":
                raise InputError(
                    f"policy is {settings.name!r} with a schedule; its density follows from its {settings.matched_by}, "
                    "which no schedule of sparsity changes"
                )

    def sparsity_at(self, layer: int, step: int | None, num_steps: int | None) -> float:
        """Share of video block pairs dropped in one layer at one denoising step.

        >>> config = DraftConfig(sparsity=0.75, warmup=0.25)
        >>> [round(config.sparsity_at(0, step, 20), 3) for step in (5, 12, 19)]
        [0.618, 0.766, 0.821]

        >>> DraftConfig(schedule=SparsitySchedule(steps=(0.5, 1.0), sparsity=(0.5, 0.9))).sparsity_at(0, 15, 20)
        0.9
        """
        if isinstance(self.schedule, SparsitySchedule):
            return self.schedule.at(layer, step, num_steps)
        if self.policy != "draft" or step is None or num_steps is None:
            return self.sparsity
        first = self.num_warmup_steps(num_steps)
        if step < first:  # a policy may look at dense steps too
            return self.sparsity
        return growing_sparsity(self.sparsity, self.growth, first, num_steps)[step - first]

    def is_hardly_sparse(self, layer: int, step: int | None, num_steps: int | None) -> bool:
        """Whether growth or the schedule leave so little sparsity that dense attention is as fast, and exact.

        >>> config = DraftConfig(sparsity=0.5, warmup=0)
        >>> [step for step in range(20) if config.is_hardly_sparse(0, step, 20)]
        [0, 1, 2]
        """
        sparsity = self.sparsity_at(layer, step, num_steps)
        return sparsity < _LEAST_USEFUL_SPARSITY and (self.schedule is not None or sparsity < self.sparsity)

    def num_warmup_steps(self, num_steps: int) -> int:
        """Leading dense steps of a run of ``num_steps``."""
        if isinstance(self.warmup, int):
            return min(self.warmup, num_steps)
        return math.ceil(self.warmup * num_steps - 1e-9)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
