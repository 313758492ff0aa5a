"""Attention calls of a real run: what densities are matched and times are taken on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from draftattn.attention import attend
from draftattn.config import DraftConfig
from draftattn.eval.recall_probe import in_layout, layout_of, run_with_policy
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.dense import fastest_dense
from draftattn.policies import make_policy, policy_settings
from draftattn.policies.exact import every_block
from draftattn.policy import CallContext, ObservingPolicy

_TRIES = 12
_NEAR = 0.02
_REPEATS = 2
# The host launches a call while the GPU is busy with nothing for so many cycles, about 3 ms.
_HEAD_START_CYCLES = 5_000_000


@dataclass(frozen=True, eq=False)
class CapturedCall:
    """Tensors of an attention call, and where in the run it stood.

    Args:
        inputs: the call.
        context: its layer and step.
        scale: factor of the scores.
    """

    inputs: AttentionInputs
    context: CallContext
    scale: float | None

    def fresh(self, config: DraftConfig) -> AttentionInputs:
        """The same call in the layout of a config, with nothing pooled."""
        return in_layout(self.inputs, layout_of(config, self.inputs))


class _Recorder:
    """A policy that skips nothing and keeps the tensors of some calls, of the first guidance branch."""

    def __init__(self, layers: Iterable[int], steps: Iterable[int]) -> None:
        self._layers, self._steps = frozenset(layers), frozenset(steps)
        self.calls: dict[tuple[int, int], CapturedCall] = {}

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.policy.MaskPolicy`."""
        if context.layer in self._layers and context.step in self._steps:
            assert context.step is not None
            call = CapturedCall(inputs, context, scale)
            self.calls.setdefault((context.layer, context.step), call)
        return every_block(inputs)


def capture_calls(pipe: Any, layers: Iterable[int], steps: Iterable[int], **arguments: Any) -> list[CapturedCall]:
    """Runs a pipeline densely and keeps the queries, keys and values of chosen layers and steps.

    Args:
        pipe: a pipeline that draft attention supports.
        layers: attention layers.
        steps: denoising steps.
        **arguments: see `draftattn.eval.recall_probe.run_with_policy`.
    """
    recorder = _Recorder(layers, steps)
    run_with_policy(pipe, recorder, **arguments)
    return list(recorder.calls.values())


def match_density(config: DraftConfig, density: float, calls: Sequence[CapturedCall]) -> DraftConfig:
    """The config whose masks compute a share of the scores.

    Most policies take the budget ``sparsity = 1 - density``. Where that misses the density by more than 2 %, because
    blocks are ragged or few or the policy decides by mass, what sets the density is bisected on captured calls; of the
    values tried the one whose density came nearest is taken.

    Args:
        config: sets everything else.
        density: share of scores to compute, in (0, 1].
        calls: what masks are made of.
    """
    settings: Any = policy_settings(config.policy) if isinstance(config.policy, str) else config.policy
    matched_by = "sparsity" if settings is None else settings.matched_by

    def with_share(share: float) -> DraftConfig:
        """The config for a share that density grows with."""
        if matched_by == "sparsity":
            return replace(config, sparsity=round(1 - share, 4))
        return replace(config, policy=replace(settings, **{matched_by: round(max(share, 1e-4), 4)}))

    best, found = with_share(density), mean_density(with_share(density), calls)
    low, high = 0.0, 1.0
    for _ in range(_TRIES):
        if abs(found - density) <= _NEAR * density:
            break
        middle = (low + high) / 2
        tried = with_share(max(middle, 1e-4))
        reached = mean_density(tried, calls)
        if abs(reached - density) < abs(found - density):
            best, found = tried, reached
        low, high = (middle, high) if reached < density else (low, middle)
    return best


def mean_density(config: DraftConfig, calls: Sequence[CapturedCall]) -> float:
    """Mean density of the masks of captured calls, each made at the mean sparsity of a run."""
    policy = make_policy(replace(config, growth=0.0))
    found = [policy(call.fresh(config), call.context, call.scale).density for call in calls]
    return float(torch.stack(found).mean())


def seconds_of(
    config: DraftConfig | None, calls: Sequence[CapturedCall], num_steps: int, device: torch.device
) -> float:
    """Seconds of a sparse attention call, the making of its mask included; of a dense one for None.

    A whole run is gone through for every captured layer, with the tensors of the nearest captured step, so that a
    policy which reuses masks is timed as it is used. What a policy does in dense steps is shared by the sparse ones. On
    a GPU the time the host needs to launch does not count, unless something waits for the device.

    Returns:
        The mean over layers of the mean of two such runs.
    """
    warmup = 0 if config is None else config.num_warmup_steps(num_steps)
    layers: dict[int, list[CapturedCall]] = {}
    for call in calls:
        layers.setdefault(call.context.layer, []).append(call)
    of_layers: list[float] = []
    for of_layer in layers.values():
        if not of_layers:  # compiles kernels and fills caches
            _seconds_of_run(config, of_layer, num_steps, warmup, device)
        runs = [_seconds_of_run(config, of_layer, num_steps, warmup, device) for _ in range(_REPEATS)]
        of_layers.append(statistics.fmean(runs) / max(1, num_steps - warmup))
    return statistics.fmean(of_layers)


def _seconds_of_run(
    config: DraftConfig | None, calls: list[CapturedCall], num_steps: int, warmup: int, device: torch.device
) -> float:
    policy = None if config is None else make_policy(config)
    run = object()
    stretches: list[Callable[[], float]] = []
    moved = {id(call): call.inputs if config is None else call.fresh(config) for call in calls}
    for step in range(num_steps):
        call = min(calls, key=lambda call, step=step: abs((call.context.step or 0) - step))  # type: ignore[misc]
        inputs = moved[id(call)]
        # nothing pooled by the steps before
        inputs = AttentionInputs(inputs.query, inputs.key, inputs.value, inputs.layout, inputs.text_lengths)
        context = replace(call.context, step=step, num_steps=num_steps, run=run)
        if config is None or policy is None:
            stretches.append(
                _timed(lambda x=inputs, s=call.scale: fastest_dense(x.query, x.key, x.value, s), device)  # type: ignore[misc]
            )
        elif step >= warmup:

            def attention(inputs: AttentionInputs = inputs, context: CallContext = context, call: Any = call) -> None:
                attend(inputs, policy(inputs, context, call.scale), config, scale=call.scale)

            stretches.append(_timed(attention, device))
        elif isinstance(policy, ObservingPolicy):

            def observe(inputs: AttentionInputs = inputs, context: CallContext = context, call: Any = call) -> None:
                policy.observe(inputs, context, call.scale)

            stretches.append(_timed(observe, device))
    return sum(seconds() for seconds in stretches)


def _timed(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Runs a call; what is given tells its seconds, and on a GPU waits for its end."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return lambda: seconds
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START_CYCLES)
    first.record()
    call()
    last.record()

    def elapsed() -> float:
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return elapsed
