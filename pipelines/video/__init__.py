"""Draft attention in Hugging Face diffusers."""

from draftattn.pipelines.video.enable import DraftHandle, disable, enable
from draftattn.pipelines.video.pipeline import DraftAttentionPipeline

__all__ = ["DraftAttentionPipeline", "DraftHandle", "disable", "enable"]
