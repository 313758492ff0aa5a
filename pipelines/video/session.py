"""Draft attention on one transformer: the hooks that turn it on and off."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from draftattn.attention import attend
from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.layout import BlockLayout, TokenGrid, block_layout
from draftattn.pipelines.video import dispatch
from draftattn.pipelines.video.adapter import TextTokens, TokenSite, VideoAdapter, resolve_layers
from draftattn.pipelines.video.stats import StatsRecorder, Stopwatch
from draftattn.pipelines.video.steps import StepClock, StepInfo
from draftattn.policies import make_policy
from draftattn.policy import CallContext, MaskPolicy, ObservingPolicy


class TransformerSession:
    """Everything draft attention does to one transformer, all of it by torch hooks that `remove` takes away.

    Once per forward the video tokens and the rotary table change into blocked order, and back after the last
    projection; this holds for every step, so that caches which carry activations from step to step stay valid. The
    self-attention processors are pointed to draft attention only while the forward runs.

    Args:
        name: what to call the transformer in statistics and messages.
        transformer: the model.
        adapter: its family.
        config: the settings.
        clock: tells the denoising step.
        recorder: takes the statistics.
        policy: chooses the blocks; None for the one that the config names.

    Raises:
        InputError: if a dense layer does not exist, or an attention processor does not go through diffusers'
            dispatcher.
    """

    def __init__(
        self,
        name: str,
        transformer: nn.Module,
        adapter: VideoAdapter,
        config: DraftConfig,
        clock: StepClock,
        recorder: StatsRecorder,
        policy: MaskPolicy | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.policy: MaskPolicy = make_policy(config) if policy is None else policy
        self._adapter = adapter
        self._clock = clock
        self._recorder = recorder
        self._transformer = weakref.ref(transformer)
        layers = adapter.attention_layers(transformer)
        self._dense_layers = resolve_layers(config.dense_layers, len(layers))
        for layer, attention in enumerate(layers):
            dispatch.check_processor(attention, f"{name} attention layer {layer}")
        self._root_handles: list[RemovableHandle] = []
        self._inner_handles: list[RemovableHandle] = []
        self._hooked: list[weakref.ref[nn.Module]] = []
        self._rerouted: list[dispatch.Reroute] = []
        self._grid: TokenGrid | None = None
        self._text = TextTokens()
        self._step = StepInfo()
        self._sparse_step = False

    def install(self) -> None:
        """Registers the hooks."""
        transformer = self.transformer
        self._clock.install()
        self._root_handles = [
            transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            transformer.register_forward_hook(self._after_forward, always_call=True),
        ]

    def remove(self) -> None:
        """Takes every hook away; the transformer is as it was."""
        self._restore_processors()
        self._grid = None
        for handle in (*self._root_handles, *self._inner_handles):
            handle.remove()
        self._root_handles, self._inner_handles, self._hooked = [], [], []
        self._clock.remove()

    def _before_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._restore_processors()  # an interrupt may have skipped _after_forward
        arguments = _arguments_by_name(transformer, args, kwargs)
        self._step = self._clock.read()
        self._sparse_step = self._is_sparse(self._step)
        self._recorder.begin_forward(self.name, self._step)
        self._check_call(transformer, arguments)
        self._text = self._adapter.prepare_text(arguments)
        self._hook_inner_modules(transformer)
        self._grid = self._adapter.token_grid(transformer, arguments)
        for layer, attention in enumerate(self._adapter.attention_layers(transformer)):
            dispatch.check_processor(attention, f"{self.name} attention layer {layer}")
            self._rerouted.append(dispatch.Reroute(attention))
        return (), arguments

    def _after_forward(self, transformer: nn.Module, args: Any, output: Any) -> None:
        del transformer, args, output
        self._restore_processors()
        self._grid = None

    def _restore_processors(self) -> None:
        for reroute in self._rerouted:
            reroute.undo()
        self._rerouted = []

    def _hook_inner_modules(self, transformer: nn.Module) -> None:
        """Hooks token sites and attention modules, anew if some were replaced since (a LoRA wraps layers)."""
        sites = [(site, getattr(transformer, site.name)) for site in self._adapter.token_sites]
        layers = self._adapter.attention_layers(transformer)
        modules = [*(module for _, module in sites), *layers]
        if [reference() for reference in self._hooked] == modules:
            return
        for handle in self._inner_handles:
            handle.remove()
        self._inner_handles = [
            *(module.register_forward_hook(_SiteHook(self, site)) for site, module in sites),
            *(module.register_forward_pre_hook(_LayerHook(self, layer)) for layer, module in enumerate(layers)),
        ]
        self._hooked = [weakref.ref(module) for module in modules]

    def _is_sparse(self, info: StepInfo) -> bool:
        if info.step is not None and info.num_steps is not None:
            return info.step >= self.config.num_warmup_steps(info.num_steps)
        if self.config.warmup == 0:
            return True
        raise InputError(
            f"warmup is {self.config.warmup!r}, but the denoising step is not known: enable the pipeline rather than "
            "its transformer, call the transformer inside transformer.cache_context('cond', step_index=…, "
            "num_inference_steps=…), or set warmup=0"
        )

    def _check_call(self, transformer: Any, arguments: dict[str, Any]) -> None:
        if getattr(transformer, "_parallel_config", None) is not None:
            raise InputError(f"{self.name} has context parallelism on; draft attention runs on one device so far")
        if torch.is_grad_enabled() and getattr(transformer, "is_gradient_checkpointing", False):
            raise InputError(f"{self.name} has gradient checkpointing on, whose second forward would be dense")
        if self.config.tile is not None and self.config.tile[0] > 1:
            reason = self._adapter.frame_order_reason(transformer, arguments)
            if reason is not None:
                raise InputError(f"tile is {self.config.tile}; {self.name} needs tiles of one frame, because {reason}")

    def layout(self, device: torch.device, num_text_tokens: int = 0) -> BlockLayout:
        """The block layout of the forward in progress."""
        assert self._grid is not None
        return block_layout(
            self._grid,
            self.config.tile,
            block_size=self.config.block_size,
            num_text_tokens=num_text_tokens,
            device=device,
        )

    def attention(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """Serves the self-attention of a layer: ``[B, S, H, D]`` in and out."""
        info = self._step
        assert self._grid is not None
        layout = self.layout(query.device, query.shape[1] - self._grid.num_tokens)
        inputs = AttentionInputs(query, key, value, layout, self._text.lengths)
        context = CallContext(layer, info.step, info.num_steps, info.branch, info.run)
        if not self._sparse_step or layer in self._dense_layers:
            self._recorder.record(self.name, info.step, info.branch, layer)
            if isinstance(self.policy, ObservingPolicy) and layer not in self._dense_layers:
                self.policy.observe(inputs, context, scale)
            attn_mask = None if self._text.mask_is_full else attn_mask
            return dispatch.dense_attention(query, key, value, attn_mask, scale, self._rerouted[layer].backend)
        watch = Stopwatch(query.device)
        mask = self.policy(inputs, context, scale)
        watch.stop()
        self._recorder.record(self.name, info.step, info.branch, layer, mask.density, watch)
        return attend(inputs, mask, self.config, scale=scale)

    @property
    def in_forward(self) -> bool:
        """Whether the transformer's forward is running."""
        return self._grid is not None

    @property
    def transformer(self) -> nn.Module:
        """The model; it must be alive."""
        transformer = self._transformer()
        assert transformer is not None
        return transformer


class _SiteHook:
    """Reorders the tokens in a module's output."""

    def __init__(self, session: TransformerSession, site: TokenSite) -> None:
        self._session, self._site = session, site

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        if not self._session.in_forward:
            return output
        if isinstance(output, (tuple, list)):
            return type(output)(self._reorder(tensor) for tensor in output)
        return self._reorder(output)

    def _reorder(self, x: Tensor) -> Tensor:
        layout = self._session.layout(x.device)
        first, last = self._site.dims[0], self._site.dims[-1]
        flat = x.flatten(first, last)
        flat = layout.from_blocks(flat, first) if self._site.restores else layout.to_blocks(flat, first)
        return flat.view(x.shape)


class _LayerHook:
    """Says which layer the next attention call belongs to."""

    def __init__(self, session: TransformerSession, layer: int) -> None:
        self._session, self._layer = session, layer

    def __call__(self, module: nn.Module, args: Any) -> None:
        del module, args
        if self._session.in_forward:
            dispatch.set_current_call(self._serve)

    def _serve(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
    ) -> Tensor:
        return self._session.attention(self._layer, query, key, value, attn_mask, scale)


def _arguments_by_name(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
