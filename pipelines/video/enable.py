"""Turning draft attention on and off."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

from torch import nn

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.pipelines.video.adapter import adapter_for, supported_classes
from draftattn.pipelines.video.session import TransformerSession
from draftattn.pipelines.video.stats import DraftStats, StatsRecorder
from draftattn.pipelines.video.steps import StepClock
from draftattn.policy import MaskPolicy
from draftattn.presets import resolve_config

_sessions: weakref.WeakKeyDictionary[nn.Module, TransformerSession] = weakref.WeakKeyDictionary()


class DraftHandle:
    """Draft attention as it is enabled on a pipeline or transformer; also ``pipeline.draft``.

    Leaving it as a context manager disables.
    """

    def __init__(
        self, target: Any, config: DraftConfig, sessions: list[TransformerSession], recorder: StatsRecorder
    ) -> None:
        self.config = config
        self._target = weakref.ref(target)
        self._sessions = sessions
        self._recorder = recorder

    def stats(self) -> DraftStats:
        """Realised density and mask time of every self-attention call of the latest run; waits for the device."""
        return self._recorder.read()

    def reset_stats(self) -> None:
        """Forgets the calls so far. Happens by itself when a new run begins."""
        self._recorder.start_run()

    def disable(self) -> None:
        """Restores the model, as `disable` does; nothing happens if it was enabled anew since."""
        target = self._target()
        if target is not None and all(_sessions.get(session.transformer) is session for session in self._sessions):
            disable(target)

    def remove_sessions(self) -> None:
        """Removes what this handle installed, wherever it still is."""
        for session in self._sessions:
            session.remove()

    def __enter__(self) -> DraftHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def __repr__(self) -> str:
        names = ", ".join(session.name for session in self._sessions)
        return f"DraftHandle({names}: {self.config})"


def enable(
    pipeline_or_transformer: Any, config: DraftConfig | str | None = None, *, policy: MaskPolicy | None = None
) -> DraftHandle:
    """Computes the self-attention of a video model by draft attention from now on.

    Works on a diffusers pipeline (all its transformers; ``pipeline.draft`` is then the handle) or on one transformer.
    Enabling again replaces the settings. Stock processors stay in place, so LoRA, QKV fusion, offloading and
    callbacks work as before. Compiled models stay compiled, whether blocks (``compile_repeated_blocks``) or whole.

    Args:
        pipeline_or_transformer: a pipeline with a supported transformer, or the transformer.
        config: settings, the name of a preset, or None for the defaults.
        policy: chooses the blocks in place of the draft policy; ``sparsity`` and ``selection`` are then not used.

    Returns:
        The handle with the statistics.

    Raises:
        InputError: if the transformer's class is not supported (the message lists those that are), or a setting does
            not fit the model.

    >>> from diffusers import WanTransformer3DModel
    >>> transformer = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, text_dim=8, freq_dim=32,
    ...     ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads")
    >>> handle = enable(transformer, "fast")
    >>> handle.config.sparsity
    0.9
    >>> disable(transformer)
    """
    resolved = resolve_config(config)
    transformers = _transformers_of(pipeline_or_transformer)
    adapters = [adapter_for(type(transformer).__name__) for transformer in transformers.values()]
    pipeline = None if isinstance(pipeline_or_transformer, nn.Module) else pipeline_or_transformer
    recorder = StatsRecorder()
    sessions = [
        TransformerSession(name, transformer, adapter, resolved, StepClock(transformer, pipeline), recorder, policy)
        for (name, transformer), adapter in zip(transformers.items(), adapters, strict=True)
    ]
    disable(pipeline_or_transformer)
    for transformer, session in zip(transformers.values(), sessions, strict=True):
        session.install()
        _sessions[transformer] = session
    handle = DraftHandle(pipeline_or_transformer, resolved, sessions, recorder)
    if pipeline is not None:
        pipeline.draft = handle
    return handle


def disable(pipeline_or_transformer: Any) -> None:
    """Restores a pipeline or transformer to what it was before `enable`, bit for bit. Does nothing if not enabled."""
    for transformer in _transformers_of(pipeline_or_transformer).values():
        session = _sessions.pop(transformer, None)
        if session is not None:
            session.remove()
    if not isinstance(pipeline_or_transformer, nn.Module):
        handle = pipeline_or_transformer.__dict__.pop("draft", None)
        if isinstance(handle, DraftHandle):
            handle.remove_sessions()  # those of transformers that the pipeline has replaced since


def _transformers_of(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {"transformer": _uncompiled(target)}
    found = {name: getattr(target, name, None) for name in ("transformer", "transformer_2")}
    transformers = {name: _uncompiled(module) for name, module in found.items() if isinstance(module, nn.Module)}
    if not transformers:
        raise InputError(
            f"{type(target).__name__} has no transformer; draft attention runs on pipelines with one of "
            f"{', '.join(supported_classes())}"
        )
    return transformers


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile(module)`` returns; others as they are."""
    return getattr(module, "_orig_mod", module)
