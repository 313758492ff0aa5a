"""How much the output of a transformer changes when one of its layers becomes sparse, and the weights that follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.pipelines.video import enable
from draftattn.policies import make_policy
from draftattn.policy import CallContext, MaskPolicy

LEVEL = 0.9
_LEAST_WEIGHT = 0.25


@dataclass(frozen=True)
class Sensitivity:
    """Squared relative error of a transformer's output where a single layer is sparse.

    Args:
        errors: for each layer the mean of ``|sparse - dense|² / |dense|²``; None for layers that stay dense.
        level: the sparsity of the layer.
        steps: the denoising steps measured.
    """

    errors: tuple[float | None, ...]
    level: float
    steps: tuple[int, ...]


@dataclass
class OneLayer:
    """A mask policy that keeps every layer dense, or every layer but one.

    Args:
        config: the settings of the layer that is sparse.
        level: its sparsity.
        layer: its number; None for a dense run, whose layers and step are noted.
    """

    config: DraftConfig
    level: float
    layer: int | None = None
    seen: set[int] = field(default_factory=set)
    step: int | None = None

    def __post_init__(self) -> None:
        alone = replace(self.config, growth=0, schedule=None)
        self._sparse: MaskPolicy = make_policy(replace(alone, sparsity=self.level))
        self._dense: MaskPolicy = make_policy(replace(alone, sparsity=0.0, policy="draft", selection="row"))

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `MaskPolicy`."""
        if self.layer is None:
            self.seen.add(context.layer)
            self.step = context.step
        policy = self._sparse if context.layer == self.layer else self._dense
        return policy(inputs, context, scale)


def measure_sensitivity(
    pipe: Any,
    config: DraftConfig,
    runs: Iterable[Mapping[str, Any]],
    *,
    num_steps: int,
    measured_steps: int = 1,
    level: float = LEVEL,
) -> Sensitivity:
    r"""Makes each layer of a dense run sparse on its own and compares what the transformer puts out.

    An attention output's own error says little: that of an early layer passes through all later ones, that of a late
    one does not. So after a forward of the dense run the transformer runs once more on the same inputs for every
    layer: for :math:`L` layers as many forwards as :math:`L` dense steps take, for each run and step measured. A run
    ends after the last of these steps.

    Args:
        pipe: a pipeline that draft attention supports; layers of two transformers share their figures.
        config: the settings to measure, but for the sparsity.
        runs: arguments of the pipeline's call for each run, ``seed`` among them.
        num_steps: denoising steps of a run.
        measured_steps: how many steps to measure at, evenly spread, the first after the warm-up among them.
        level: sparsity of the layer.

    Raises:
        InputError: if there are fewer steps after the warm-up.
    """
    first = config.num_warmup_steps(num_steps)
    if not 1 <= measured_steps <= num_steps - first:
        raise InputError(f"measured_steps is {measured_steps}; the run has {num_steps - first} steps after its warm-up")
    steps = tuple(first + i * (num_steps - first) // measured_steps for i in range(measured_steps))
    policy = OneLayer(config, level)
    errors: dict[int, list[float]] = {}

    def stop_after_the_last(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del timestep
        pipe._interrupt = step >= steps[-1]
        return tensors

    transformers = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    with (
        enable(pipe, replace(config, schedule=None), policy=policy),
        _repeated([x for x in transformers if x is not None], policy, steps, errors),
    ):
        for run in runs:
            arguments = {name: value for name, value in run.items() if name != "seed"}
            pipe(
                **arguments,
                num_inference_steps=num_steps,
                generator=torch.Generator().manual_seed(run["seed"]),
                output_type="latent",
                callback_on_step_end=stop_after_the_last,
            )
    found = [fmean(errors[layer]) if layer in errors else None for layer in range(1 + max(errors))]
    return Sensitivity(tuple(found), level, steps)


def layer_weights(sensitivity: Sensitivity) -> tuple[float, ...]:
    r"""The weights of layers for `draftattn.schedule.growing_schedule`: their mean is 1.

    Where the squared error of a layer falls like one over its density :math:`d_l`, the sum of errors
    :math:`\sum_l w_l / d_l` at a given sum of densities is smallest for :math:`d_l \propto \sqrt{w_l}`. Steps follow
    the same rule: weights :math:`t^{-2g}` of their errors give densities :math:`\propto t^{-g}`, as by default. No
    weight is below a quarter of the mean, however small the error that was seen.

    >>> layer_weights(Sensitivity((0.04, 0.01, None), level=0.9, steps=(5,)))
    (1.3333333333333333, 0.6666666666666666, 1.0)
    """
    roots = [None if error is None else math.sqrt(error) for error in sensitivity.errors]
    mean = fmean(root for root in roots if root is not None)
    if mean == 0:  # nothing was skipped
        return (1.0,) * len(roots)
    weights = [1.0 if root is None else max(root / mean, _LEAST_WEIGHT) for root in roots]
    return tuple(weight / fmean(weights) for weight in weights)


@contextmanager
def _repeated(
    transformers: list[nn.Module], policy: OneLayer, steps: tuple[int, ...], errors: dict[int, list[float]]
) -> Iterator[None]:
    """Runs the forward of transformers once more for every layer in the steps given, and notes the errors."""
    before = [transformer.__dict__.get("forward") for transformer in transformers]

    def repeat(forward: Any) -> Any:
        def repeated(*args: Any, **kwargs: Any) -> Any:
            policy.step, policy.seen = None, set()
            output = forward(*args, **kwargs)
            if policy.step in steps:
                dense: Tensor = output[0].float()
                try:
                    for layer in sorted(policy.seen):
                        policy.layer = layer
                        sparse: Tensor = forward(*args, **kwargs)[0].float()
                        error = (sparse - dense).square().sum() / dense.square().sum()
                        errors.setdefault(layer, []).append(float(error))
                finally:
                    policy.layer = None
            return output

        return repeated

    try:
        for transformer in transformers:
            # inside the hooks of draft attention, which set up the forward once for all repetitions
            transformer.__dict__["forward"] = repeat(transformer.forward)
        yield
    finally:
        for transformer, forward in zip(transformers, before, strict=True):
            transformer.__dict__.pop("forward", None)
            if forward is not None:
                transformer.__dict__["forward"] = forward
