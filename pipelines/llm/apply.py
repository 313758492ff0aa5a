"""Putting a sparse attention system into a stock language model, and taking it out again."""

from __future__ import annotations

import dataclasses
import importlib
import weakref
from types import TracebackType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from draftattn.errors import InputError
from draftattn.pipelines.llm import attention
from draftattn.pipelines.llm.density import DensityRecorder
from draftattn.pipelines.llm.system import AttentionSystem, SystemConfig

# where the class of each system is; imported on first use
SYSTEMS: dict[str, tuple[str, str]] = {
    "draft": ("prefill", "DraftPrefill"),
    "xattention": ("prefill", "XAttention"),
    "minference": ("prefill", "MInference"),
    "flexprefill": ("prefill", "FlexPrefill"),
    "moba": ("moba", "Moba"),
    "infllm": ("infllm", "InfLLM"),
    "streaming": ("streaming", "Streaming"),
    "seer": ("seer", "Seer"),
    "nsa": ("nsa", "NSA"),
    "selective": ("selective", "SelectiveAttention"),
}

_handles: weakref.WeakKeyDictionary[nn.Module, AttentionHandle] = weakref.WeakKeyDictionary()


class AttentionHandle:
    """A system as it is applied to a model. Leaving it as a context manager removes it."""

    def __init__(self, model: PreTrainedModel, system: AttentionSystem, layers: dict[int, nn.Module]) -> None:
        self.system = system
        self._model = weakref.ref(model)
        self._config = model.config.get_text_config(decoder=True)
        self._layers = layers
        self._stock_name = self._config._attn_implementation
        self._hooks: list[Any] = []

    @property
    def config(self) -> SystemConfig:
        """The system's settings."""
        return self.system.config

    def record_density(self) -> DensityRecorder:
        """From now on the realised density of every call is noted; returns what notes it."""
        self.system.recorder = DensityRecorder()
        return self.system.recorder

    def install(self) -> None:
        """Puts the system in charge, again if it was removed; `apply` does this."""
        model = self._model()
        assert model is not None
        self.system.attach(model, self._layers)
        modules = list(self._layers.values())
        try:
            for layer, module in self._layers.items():
                self._hooks.append(module.register_forward_pre_hook(_CacheOfCall(self.system, layer), with_kwargs=True))
            attention.register()
            model.set_attn_implementation(attention.NAME)
            attention.serve(self._config, modules, self.system)
            _handles[model] = self
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restores the model, as `remove` does; nothing happens the second time."""
        model = self._model()
        while self._hooks:
            self._hooks.pop().remove()
        attention.release(self._config, list(self._layers.values()))
        if model is None:
            return
        self.system.detach()
        if self._config._attn_implementation == attention.NAME:
            model.set_attn_implementation(self._stock_name)
        if _handles.get(model) is self:
            del _handles[model]

    def __enter__(self) -> AttentionHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"AttentionHandle({self.system.name}: {self.config})"


class _CacheOfCall:
    """Notes the cache that a layer is called with, for systems that keep something beside it."""

    def __init__(self, system: AttentionSystem, layer: int) -> None:
        self.system, self.layer = system, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self.system.caches[self.layer] = (lambda: None) if cache is None else weakref.ref(cache)


def apply(model: PreTrainedModel, system: str | AttentionSystem, **options: Any) -> AttentionHandle:
    """Computes the attention of a causal language model by a sparse system from now on.

    The model stays as transformers made it: `generate`, caches, gradients, padding on either side and batches work.
    Applying again replaces what was applied before, which stays in force where that fails.

    Args:
        model: a causal language model of transformers 5 with plain softmax attention (Llama, SmolLM, Qwen2, Qwen3,
            Mistral and others). Layers whose sliding window hides something keep it and are not made sparser.
        system: a name (``draft``, ``xattention``, ``minference``, ``flexprefill``, ``moba``, ``infllm``,
            ``streaming``, ``seer``, ``nsa``, ``selective``), or a system of your own.
        options: the system's settings; those of its configuration class.

    Returns:
        The handle: ``handle.remove()`` and a context manager.

    Raises:
        InputError: if the model or an option cannot be used.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> handle = apply(model, "moba", chunk_size=32, top_k=2)
    >>> model.config._attn_implementation
    'draftattn'
    >>> remove(model)
    >>> model.config._attn_implementation
    'sdpa'
    """
    if isinstance(model, str | AttentionSystem):
        raise InputError(
            f"model is a {type(model).__name__}; the model comes first, then the system: apply(model, ...)"
        )
    chosen = make_system(system, **options)
    layers = attention_layers(model)
    exempt = _resolve_layers(chosen.config.dense_layers, len(layers))
    layers = {layer: module for layer, module in layers.items() if layer not in exempt}
    before = _handles.get(model)
    remove(model)
    if model.config.get_text_config(decoder=True)._attn_implementation == attention.NAME:
        raise InputError(
            "another model with this configuration has a system applied, or this is a copy of one; remove it there, or "
            "call model.set_attn_implementation('sdpa') here, and apply again"
        )
    handle = AttentionHandle(model, chosen, layers)
    try:
        handle.install()
    except BaseException:
        if before is not None:
            before.install()
        raise
    return handle


def remove(model: nn.Module) -> None:
    """Takes out what `apply` put in, without a trace; nothing happens if there is nothing."""
    handle = _handles.get(model)
    if handle is not None:
        handle.remove()


def make_system(system: str | AttentionSystem, **options: Any) -> AttentionSystem:
    """A system by its name and settings; a system is returned as it is.

    Raises:
        InputError: if the name or an option is unknown, or a value not allowed.
    """
    if isinstance(system, AttentionSystem):
        if options:
            raise InputError(f"options {', '.join(options)} are given with a made system; give them with a name")
        return system
    if not isinstance(system, str):
        raise InputError(f"system is a {type(system).__name__}; it must be a name or an AttentionSystem")
    kind = system_class(system)
    known = [field.name for field in dataclasses.fields(kind.config_class)]
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"{system} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return kind(kind.config_class(**options))


def system_class(name: str) -> type[AttentionSystem]:
    """The class of a system."""
    if name not in SYSTEMS:
        raise InputError(f"system is {name!r}; choose from {', '.join(SYSTEMS)}")
    module, attribute = SYSTEMS[name]
    return getattr(importlib.import_module(f"draftattn.pipelines.llm.{module}"), attribute)


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The causal attention modules of a language model, by layer.

    Raises:
        InputError: if it has none, or attention that cannot be served.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model is a {type(model).__name__}; it must be a model of transformers")
    config = model.config.get_text_config(decoder=True)
    for name in ("attention_chunk_size", "attn_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise InputError(f"{type(model).__name__} has {name}; only plain causal softmax attention can be served")
    wanted = ("layer_idx", "is_causal", "num_key_value_groups", "scaling")
    found = {
        int(module.layer_idx): module  # type: ignore[arg-type]
        for module in model.modules()
        if all(hasattr(module, name) for name in wanted) and module.is_causal
    }
    allowed = "allowed are decoder models such as Llama, Qwen2, Qwen3 and Mistral"
    if not found:
        raise InputError(
            f"{type(model).__name__} has no attention module with {', '.join(wanted)}, is_causal being true, by which "
            f"one that can be served is known; {allowed}"
        )
    if not model._can_set_attn_implementation():
        raise InputError(
            f"{type(model).__name__} computes attention without transformers' AttentionInterface; {allowed}"
        )
    return dict(sorted(found.items()))


def _resolve_layers(layers: tuple[int, ...], count: int) -> set[int]:
    for layer in layers:
        if not -count <= layer < count:
            raise InputError(f"dense_layers names layer {layer}; the model has layers 0 to {count - 1}")
    return {layer % count for layer in layers}
