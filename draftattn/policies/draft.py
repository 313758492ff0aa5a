"""The draft: keep the block pairs that matter in a low-resolution attention map."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from draftattn.config import DraftConfig
from draftattn.draft import draft_map, draft_masses, draft_scores
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import BlockSelection, select_from_rank, select_largest
from draftattn.policy import CallContext
from draftattn.selection import blocks_kept_per_row, entries_dropped_per_head


@dataclass(frozen=True)
class DraftPolicy:
    """DraftAttention (arXiv 2505.14708): keep the block pairs that matter in the draft map. Text stays dense.

    Args:
        config: ``sparsity`` or ``schedule``, ``selection`` and ``draft_keys`` are used; with weighted means in the
            residual the draft of per-row selection is made from them too.
    """

    config: DraftConfig

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `MaskPolicy`."""
        layout = inputs.layout
        sparsity = self.config.sparsity_at(context.layer, context.step, context.num_steps)
        of_tokens = self.config.draft_keys == "tokens"
        weighted = self.config.residual and self.config.weighted_means and self.config.selection == "row"
        if self.config.residual and not self.config.weighted_means:
            inputs.pool("query", "key", "value")
        elif weighted or of_tokens:
            inputs.pool("query")
        num_text_blocks = layout.num_blocks - layout.num_video_blocks
        selection: BlockSelection
        if self.config.selection == "row":
            # softmax keeps the order of a row
            selection = select_largest(
                draft_masses(inputs, scale) if of_tokens else draft_scores(inputs, scale, weighted),
                blocks_kept_per_row(layout.num_video_blocks, sparsity),
                bias=None if of_tokens else layout.log_video_block_sizes,
                keep_diagonal=True,
                dense_tail=num_text_blocks,
            )
        else:
            rank = entries_dropped_per_head(layout.num_video_blocks, sparsity)
            draft = torch.softmax(draft_masses(inputs, scale), -1) if of_tokens else draft_map(inputs, scale)
            selection = select_from_rank(draft, rank, dense_tail=num_text_blocks)
        mask = BlockMask(
            selection.kv_num_blocks, selection.kv_indices, layout.offsets, inputs.key_offsets, layout.block_size
        )
        mask.__dict__["block_map"] = selection.block_map  # spares the cached property its scatter
        return mask
