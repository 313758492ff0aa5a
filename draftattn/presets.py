"""Named settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.layout import PUBLISHED_TILE

# DraftAttention (arXiv 2505.14708): 8×16 windows, a quarter of the steps dense, and in its code the first
# block of Wan and the first two dual-stream blocks of HunyuanVideo dense.
_PUBLISHED = DraftConfig(selection="head", residual=False, tile=PUBLISHED_TILE, warmup=0.25, growth=0.0)
_PUBLISHED_WAN = replace(_PUBLISHED, dense_layers=(0,))
_PUBLISHED_HUNYUAN = replace(_PUBLISHED, dense_layers=(0, 1))

PRESETS: dict[str, DraftConfig] = {
    "quality": DraftConfig(sparsity=0.5),
    "balanced": DraftConfig(sparsity=0.75),
    "fast": DraftConfig(sparsity=0.9),
    "published-wan-55": replace(_PUBLISHED_WAN, sparsity=0.55),
    "published-wan-75": replace(_PUBLISHED_WAN, sparsity=0.75),
    "published-hunyuan-60": replace(_PUBLISHED_HUNYUAN, sparsity=0.6),
    "published-hunyuan-80": replace(_PUBLISHED_HUNYUAN, sparsity=0.8),
    "published-hunyuan-90": replace(_PUBLISHED_HUNYUAN, sparsity=0.9),
}


def preset(name: str, **changes: Any) -> DraftConfig:
    """The settings of a name, with changes.

    ``quality``, ``balanced`` and ``fast`` are ours at 50, 75 and 90 % sparsity; ``published-wan-…`` and
    ``published-hunyuan-…`` are the paper's for these models (arXiv 2505.14708) at the sparsity in their name.

    Args:
        name: one of `PRESETS`.
        **changes: fields of `DraftConfig` to set otherwise.

    Raises:
        InputError: if there is no such preset, or a change is out of range.

    >>> preset("published-hunyuan-90", warmup=0).sparsity
    0.9
    """
    if name not in PRESETS:
        raise InputError(f"preset is {name!r}; choose from {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


def resolve_config(draft: DraftConfig | str | None) -> DraftConfig:
    """A config as it is, a preset by its name, or the default for None."""
    if draft is None:
        return DraftConfig()
    if isinstance(draft, DraftConfig):
        return draft
    if isinstance(draft, str):
        return preset(draft)
    raise InputError(f"draft is {draft!r}; it must be a DraftConfig or a preset ({', '.join(PRESETS)})")
