"""Measuring the recall of settings inside a real run, without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from draftattn.config import DraftConfig
from draftattn.eval.recall import ExactAttention, exact_attention, measure_recall
from draftattn.inputs import AttentionInputs
from draftattn.kernels.backends import BackendName
from draftattn.kernels.block_mask import BlockMask
from draftattn.layout import BlockLayout, block_layout
from draftattn.pipelines.video import enable
from draftattn.policies import make_policy
from draftattn.policy import CallContext, MaskPolicy, ObservingPolicy


class RecallProbe:
    """A mask policy that hands through the masks of another, and measures other settings on the same tensors.

    What it measures it makes anew from queries, keys and values, so the run stays as it would be without it. Layers
    and steps that a setting keeps dense are measured as if they were sparse. A policy that remembers is asked in the
    steps looked at only, and shown those of its warm-up.

    Args:
        base: chooses the blocks of the run.
        settings: what to measure, by name.
        layers: attention layers to look at; None for all.
        steps: denoising steps to look at; None for all.
        on_row: given the figures of every call and setting, see `draftattn.eval.recall.measure_recall`, with
            ``layer``, ``step``, ``branch`` and ``setting``.
        bounds: whether the best and a random mask are measured too.
    """

    def __init__(
        self,
        base: MaskPolicy,
        settings: Mapping[str, DraftConfig],
        *,
        layers: Iterable[int] | None,
        steps: Iterable[int] | None,
        on_row: Callable[[dict[str, Any]], None],
        bounds: bool = True,
    ) -> None:
        self._base = base
        self._settings = settings
        self._layers = None if layers is None else frozenset(layers)
        self._steps = None if steps is None else frozenset(steps)
        self._on_row = on_row
        self._bounds = bounds
        self._policies = {name: make_policy(config) for name, config in settings.items()}

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `MaskPolicy`."""
        mask = self._base(inputs, context, scale)
        if self._layers is None or context.layer in self._layers:
            self._show_warmup(inputs, context, scale)
            if self._steps is None or context.step in self._steps:
                self._measure(inputs, context, scale)
        return mask

    def observe(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> None:
        """Hands a dense call on to a policy that looks at them."""
        if isinstance(self._base, ObservingPolicy):
            self._base.observe(inputs, context, scale)

    def _show_warmup(self, inputs: AttentionInputs, context: CallContext, scale: float | None) -> None:
        if context.step is None or context.num_steps is None:
            return
        for name, config in self._settings.items():
            policy = self._policies[name]
            if context.step < config.num_warmup_steps(context.num_steps) and isinstance(policy, ObservingPolicy):
                policy.observe(in_layout(inputs, layout_of(config, inputs)), context, scale)

    def _measure(self, inputs: AttentionInputs, context: CallContext, scale: float | None) -> None:
        exact: dict[BlockLayout, tuple[AttentionInputs, ExactAttention]] = {}
        for name, config in self._settings.items():
            layout = layout_of(config, inputs)
            if layout not in exact:
                moved = in_layout(inputs, layout)
                exact[layout] = moved, exact_attention(moved, config, scale)
            moved, attention = exact[layout]
            mask = self._policies[name](moved, context, scale)
            figures = measure_recall(moved, mask, attention, config, scale, seed=context.layer, bounds=self._bounds)
            call = {"layer": context.layer, "step": context.step, "branch": context.branch}
            self._on_row({"setting": name, **call, **figures})


def layout_of(config: DraftConfig, inputs: AttentionInputs) -> BlockLayout:
    """The layout of a setting for a call that may be in another."""
    return block_layout(
        inputs.layout.grid,
        config.tile,
        block_size=config.block_size,
        num_text_tokens=inputs.layout.num_text_tokens,
        device=inputs.query.device,
    )


def in_layout(inputs: AttentionInputs, layout: BlockLayout) -> AttentionInputs:
    """The same call with its video tokens in the order of another layout of the same grid; nothing pooled yet."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if layout is not inputs.layout:
        text = torch.arange(layout.grid.num_tokens, layout.num_tokens, device=layout.permutation.device)
        order = torch.cat([inputs.layout.inverse[layout.permutation], text])
        query, key, value = (tensor.index_select(1, order) for tensor in (query, key, value))
    return AttentionInputs(query, key, value, layout, inputs.text_lengths)


def probe_run(
    pipe: Any,
    settings: Mapping[str, DraftConfig],
    *,
    seed: int,
    layers: Iterable[int] | None,
    steps: Iterable[int] | None,
    on_row: Callable[[dict[str, Any]], None],
    on_step: Callable[[], None] = lambda: None,
    bounds: bool = True,
    **arguments: Any,
) -> None:
    """Runs a pipeline once with nothing skipped and measures settings on the way; nothing is decoded.

    Args:
        pipe: a pipeline that draft attention supports.
        settings: what to measure, by name.
        seed: seed of the noise.
        layers: see `RecallProbe`.
        steps: see `RecallProbe`.
        on_row: see `RecallProbe`.
        on_step: called after every denoising step.
        bounds: see `RecallProbe`.
        **arguments: what the pipeline's call takes.
    """

    backend = next(iter(settings.values())).backend
    base = make_policy(_nothing_skipped(backend))
    probe = RecallProbe(base, settings, layers=layers, steps=steps, on_row=on_row, bounds=bounds)
    run_with_policy(pipe, probe, backend, seed=seed, on_step=on_step, **arguments)


def run_with_policy(
    pipe: Any,
    policy: MaskPolicy,
    backend: BackendName = "auto",
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
    **arguments: Any,
) -> None:
    """Runs a pipeline once with every attention call given to a policy, from the first step on; nothing is decoded.

    Args:
        pipe: a pipeline that draft attention supports.
        policy: sees every call; it should skip nothing.
        backend: the kernel.
        seed: seed of the noise.
        on_step: called after every denoising step.
        **arguments: what the pipeline's call takes.
    """

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del pipe, step, timestep
        on_step()
        return tensors

    with enable(pipe, _nothing_skipped(backend), policy=policy):
        pipe(
            **arguments,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=after_step,
        )


def _nothing_skipped(backend: BackendName) -> DraftConfig:
    return DraftConfig(sparsity=0.0, warmup=0, residual=False, backend=backend)
