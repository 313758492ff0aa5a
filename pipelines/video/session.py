"""Draft attention on one transformer: the hooks that turn it on and off."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from draftattn.attention import attend
from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.layout import BlockLayout, TokenGrid, block_layout, spans_frames
from draftattn.pipelines.video import dispatch
from draftattn.pipelines.video.adapter import TextTokens, TokenSite, VideoAdapter, resolve_layers
from draftattn.pipelines.video.parallel import check_parallelism, exchange_heads, output_split
from draftattn.pipelines.video.stats import StatsRecorder, Stopwatch, named_range
from draftattn.pipelines.video.steps import StepClock, StepInfo
from draftattn.policies import make_policy
from draftattn.policies.draft import DraftPolicy
from draftattn.policy import CallContext, MaskPolicy, ObservingPolicy


class TransformerSession:
    """Everything draft attention does to one transformer, all of it by torch hooks that `remove` takes away.

    Once per forward the video tokens and the rotary table change into blocked order, and back after the last
    projection; this holds for every step, so that caches which carry activations from step to step stay valid. The
    self-attention processors are pointed to draft attention only while the forward runs.

    Under ``torch.compile`` the hooks of the whole transformer run outside the graph, those of the token sites inside,
    and an attention call is one node of it.

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
        self._slots = [dispatch.LayerSlot(self, layer, adapter.has_text_tokens) for layer in range(len(layers))]
        self._root_handles: list[RemovableHandle] = []
        self._sites: list[_SiteHook] = []
        self._rerouted: list[dispatch.Reroute] = []
        self._step = StepInfo()
        self._sparse_step = False
        # of the forward in progress
        self._grid: TokenGrid | None = None
        self._text = TextTokens()
        self._layouts: dict[tuple[torch.device, int], BlockLayout] = {}
        self._tile = config.tile
        self._key_mask: Tensor | None = None

    def install(self) -> None:
        """Registers the hooks."""
        transformer = self.transformer
        self._clock.install()
        self._root_handles = [
            transformer.register_forward_pre_hook(torch.compiler.disable(self._before_forward), with_kwargs=True),
            transformer.register_forward_hook(torch.compiler.disable(self._after_forward), always_call=True),
        ]

    def remove(self) -> None:
        """Takes every hook away; the transformer is as it was."""
        self._restore_processors()
        self._forget_forward()
        for handle in self._root_handles:
            handle.remove()
        for site in self._sites:
            site.remove()
        self._root_handles, self._sites = [], []
        self._clock.remove()

    def _before_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._restore_processors()  # an interrupt may have skipped _after_forward
        self._forget_forward()
        arguments = {**dict(zip(_argument_names(cast(Any, type(transformer))), args, strict=False)), **kwargs}
        self._step = self._clock.read()
        self._sparse_step = self._is_sparse(self._step)
        self._recorder.begin_forward(self.name, self._step)
        grid = self._adapter.token_grid(transformer, arguments)
        self._check_call(transformer, arguments, grid)
        self._text = self._adapter.prepare_text(arguments)
        self._hook_sites(transformer)
        self._grid = grid
        layout = self.layout(arguments["hidden_states"].device)
        for site in self._sites:
            site.begin(layout)
        for slot, attention in zip(self._slots, self._adapter.attention_layers(transformer), strict=True):
            dispatch.check_processor(attention, f"{self.name} attention layer {len(self._rerouted)}")
            self._rerouted.append(dispatch.Reroute(attention, slot, self._adapter))
        return (), arguments

    def _after_forward(self, transformer: nn.Module, args: Any, output: Any) -> None:
        del transformer, args
        missed = [site.name for site in self._sites if not site.passed]
        self._restore_processors()
        self._forget_forward()
        if missed and output is not None:
            raise RuntimeError(
                f"{self.name} ran a graph that was compiled before draft attention was enabled: tokens were not "
                f"reordered at {', '.join(missed)}. Call torch.compiler.reset() once after enabling"
            )

    def _restore_processors(self) -> None:
        for reroute in self._rerouted:
            reroute.undo()
        self._rerouted = []

    def _forget_forward(self) -> None:
        self._grid, self._text, self._layouts, self._key_mask = None, TextTokens(), {}, None
        self._tile = self.config.tile
        for site in self._sites:
            site.end()

    def _hook_sites(self, transformer: nn.Module) -> None:
        """Hooks the token sites, anew if some were replaced since (a LoRA wraps layers)."""
        modules = [getattr(transformer, site.name) for site in self._adapter.token_sites]
        if [site.module for site in self._sites] == modules:
            return
        for site in self._sites:
            site.remove()
        self._sites = [_SiteHook(site, module) for site, module in zip(self._adapter.token_sites, modules, strict=True)]

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

    def _check_call(self, transformer: Any, arguments: dict[str, Any], grid: TokenGrid) -> None:
        check_parallelism(getattr(transformer, "_parallel_config", None), self.name, self._adapter, grid)
        if torch.is_grad_enabled() and getattr(transformer, "is_gradient_checkpointing", False):
            raise InputError(f"{self.name} has gradient checkpointing on, whose second forward would be dense")
        reason = self._adapter.frame_order_reason(transformer, arguments)
        if reason is not None and spans_frames(self.config.tile):
            raise InputError(f"tile is {self.config.tile}; {self.name} needs tiles of one frame, because {reason}")
        if reason is not None and self.config.tile == "auto":
            self._tile = "frame"

    def layout(self, device: torch.device, num_text_tokens: int = 0) -> BlockLayout:
        """The block layout of the forward in progress."""
        assert self._grid is not None
        found = self._layouts.get((device, num_text_tokens))
        if found is None:
            found = self._layouts[device, num_text_tokens] = block_layout(
                self._grid,
                self._tile,
                block_size=self.config.block_size,
                num_text_tokens=num_text_tokens,
                device=device,
            )
        return found

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Serves the self-attention of a layer: ``[B, S, H, D]`` in and out."""
        parallel_config = self._rerouted[layer].parallel_config
        if parallel_config is None:
            return self._attention(layer, query, key, value, scale=scale)
        attention = functools.partial(self._attention, layer, scale=scale)
        return exchange_heads(parallel_config, query, key, value, attention)

    def _attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
        info = self._step
        assert self._grid is not None
        layout = self.layout(query.device, query.shape[1] - self._grid.num_tokens)
        inputs = AttentionInputs(query, key, value, layout, self._text.lengths)
        context = CallContext(layer, info.step, info.num_steps, info.branch, info.run)
        if not self._sparse_step or layer in self._dense_layers or self._is_hardly_sparse(layer):
            self._recorder.record(self.name, info.step, info.branch, layer)
            if isinstance(self.policy, ObservingPolicy) and layer not in self._dense_layers:
                self.policy.observe(inputs, context, scale)
            backend, kernel = self._rerouted[layer].backend, self.config.dense_backend
            with named_range("draftattn.dense"):
                return dispatch.dense_attention(query, key, value, self._mask_of_keys(query), scale, backend, kernel)
        watch = Stopwatch(query.device)
        with named_range("draftattn.mask"):
            mask = self.policy(inputs, context, scale)
        watch.stop()
        self._recorder.record(self.name, info.step, info.branch, layer, mask.density, watch)
        with named_range("draftattn.attention"):
            return attend(inputs, mask, self.config, scale=scale)

    def _is_hardly_sparse(self, layer: int) -> bool:
        # other policies may not ask the config for the sparsity
        if not isinstance(self.policy, DraftPolicy):
            return False
        return self.config.is_hardly_sparse(layer, self._step.step, self._step.num_steps)

    def _mask_of_keys(self, query: Tensor) -> Tensor | None:
        """bool ``[B, 1, 1, S]``: the valid tokens of each item; None where all are valid."""
        if self._text.lengths is None:
            return None
        if self._key_mask is None or self._key_mask.device != query.device:
            assert self._grid is not None
            ends = (self._grid.num_tokens + self._text.lengths.to(query.device))[:, None, None, None]
            self._key_mask = torch.arange(query.shape[1], device=query.device) < ends
        return self._key_mask

    @property
    def transformer(self) -> nn.Module:
        """The model; it must be alive."""
        transformer = self._transformer()
        assert transformer is not None
        return transformer


class _SiteHook:
    """Reorders the tokens in a module's output while a forward runs."""

    def __init__(self, site: TokenSite, module: nn.Module) -> None:
        self.name, self.restores = site.name, site.restores
        self.first, self.last = site.dims[0], site.dims[-1]
        self._module = weakref.ref(module)
        self._handle = module.register_forward_hook(self._reorder_output, with_kwargs=True)
        self._order: Tensor | None = None
        self._split: Callable[[Any], Any] | None = None
        self.passed = False

    @property
    def module(self) -> nn.Module | None:
        return self._module()

    def begin(self, layout: BlockLayout) -> None:
        """A forward begins."""
        module = self.module
        assert module is not None
        self._order = layout.inverse if self.restores else layout.permutation
        self._split = output_split(module, self.name)
        self.passed = False

    def end(self) -> None:
        """The forward is over."""
        self._order = self._split = None

    def remove(self) -> None:
        self._handle.remove()

    def _reorder_output(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self._order is None:
            return output
        self.passed = True  # torch.compile replays this when a graph runs that reorders
        if self._split is not None:
            # tokens change places before they are shared out to devices, so once more without that
            output = cast(Any, type(module)).forward(module, *args, **kwargs)
        if isinstance(output, (tuple, list)):
            output = tuple([self._reorder(x, self._order) for x in output])
        else:
            output = self._reorder(output, self._order)
        return output if self._split is None else self._split(output)

    def _reorder(self, x: Tensor, order: Tensor) -> Tensor:
        with named_range("draftattn.permutation"):
            return x.flatten(self.first, self.last).index_select(self.first, order.to(x.device)).view(x.shape)


@functools.lru_cache(maxsize=16)
def _argument_names(transformer_class: Any) -> list[str]:
    return list(inspect.signature(transformer_class.forward).parameters)[1:]
