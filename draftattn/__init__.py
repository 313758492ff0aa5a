"""Draft attention: block-sparse attention for video diffusion transformers, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from draftattn.attention import draft_attention
from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.kernels.api import BlockMeans, block_sparse_attention
from draftattn.kernels.block_mask import BlockMask
from draftattn.layout import BlockLayout, TokenGrid, block_layout
from draftattn.presets import preset

if TYPE_CHECKING:
    from draftattn.pipelines.video import DraftAttentionPipeline, disable, enable

__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "BlockMask",
    "BlockMeans",
    "DraftAttentionPipeline",
    "DraftConfig",
    "InputError",
    "TokenGrid",
    "block_layout",
    "block_sparse_attention",
    "disable",
    "draft_attention",
    "enable",
    "preset",
]

_NEEDS_DIFFUSERS = ("DraftAttentionPipeline", "disable", "enable")


def __getattr__(name: str) -> Any:
    # Imported on first use: `import draftattn` must not import diffusers.
    if name in _NEEDS_DIFFUSERS:
        from draftattn.pipelines import video

        return getattr(video, name)
    raise AttributeError(f"module 'draftattn' has no attribute {name!r}")
