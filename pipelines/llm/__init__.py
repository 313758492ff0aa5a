"""Sparse attention systems for the language models of transformers."""

from __future__ import annotations

import importlib
from typing import Any

from draftattn.pipelines.llm.apply import AttentionHandle, apply, remove
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem, SystemConfig

# names of single systems, imported on first use
_ELSEWHERE = {
    "AutoModelForCausalLM": "streaming",
    "SelectiveCache": "selective",
    "SinkCache": "streaming",
    "distill": "seer_training",
    "moba_attention": "moba",
    "infllm_attention": "infllm",
}

__all__ = ["AttentionCall", "AttentionHandle", "AttentionSystem", "SystemConfig", "apply", "remove", *_ELSEWHERE]


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(f"draftattn.pipelines.llm.{_ELSEWHERE[name]}"), name)
    raise AttributeError(f"module 'draftattn.pipelines.llm' has no attribute {name!r}")
