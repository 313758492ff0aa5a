"""Mask policies: from queries and keys to a block mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from draftattn.config import DraftConfig
from draftattn.draft import draft_map
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.selection import blocks_kept_per_row, select_per_head, select_per_row


@dataclass(frozen=True)
class CallContext:
    """Where in a generation an attention call stands.

    Args:
        layer: number of the attention layer in its transformer.
        step: denoising step, from 0; None outside a denoising loop.
        num_steps: steps of the run; None outside a denoising loop.
        branch: guidance branch, such as ``"cond"`` or ``"uncond"``; None where it is not known.
    """

    layer: int = 0
    step: int | None = None
    num_steps: int | None = None
    branch: str | None = None


class MaskPolicy(Protocol):
    """Anything that chooses blocks for an attention call."""

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """The block mask of one call, made on its device without a host sync."""
        ...


@dataclass(frozen=True)
class DraftPolicy:
    """DraftAttention (arXiv 2505.14708): keep the block pairs that matter in the draft map. Text stays dense.

    Args:
        config: ``sparsity`` and ``selection`` are used.
    """

    config: DraftConfig

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `MaskPolicy`."""
        del context  # the draft is made anew in every call
        layout = inputs.layout
        draft = draft_map(inputs, scale)
        video_blocks, num_text_blocks = layout.num_video_blocks, layout.num_blocks - layout.num_video_blocks
        max_per_row: int | None = None
        if self.config.selection == "row":
            selected = select_per_row(draft, self.config.sparsity)
            if num_text_blocks == 0:
                max_per_row = blocks_kept_per_row(video_blocks, self.config.sparsity)
        else:
            selected = select_per_head(draft, self.config.sparsity)
        if num_text_blocks:
            selected = torch.nn.functional.pad(selected, (0, num_text_blocks, 0, num_text_blocks), value=True)
        return BlockMask.from_block_map(selected, layout.offsets, inputs.key_offsets, layout.block_size, max_per_row)
