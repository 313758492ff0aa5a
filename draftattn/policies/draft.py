"""The draft: keep the block pairs that matter in a low-resolution attention map."""

from __future__ import annotations

from dataclasses import dataclass

from draftattn.config import DraftConfig
from draftattn.draft import draft_map, draft_scores, log_block_sizes
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import BlockSelection, select_from_rank, select_largest
from draftattn.policy import CallContext
from draftattn.selection import blocks_kept_per_row, entries_dropped_per_head


@dataclass(frozen=True)
class DraftPolicy:
    """DraftAttention (arXiv 2505.14708): keep the block pairs that matter in the draft map. Text stays dense.

    Args:
        config: ``sparsity`` and ``selection`` are used, and ``residual`` to pool the values along with the rest.
    """

    config: DraftConfig

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `MaskPolicy`."""
        del context  # the draft is made anew in every call
        layout, sparsity = inputs.layout, self.config.sparsity
        if self.config.residual:
            inputs.pool("query", "key", "value")
        num_text_blocks = layout.num_blocks - layout.num_video_blocks
        selection: BlockSelection
        if self.config.selection == "row":
            # softmax keeps the order of a row
            selection = select_largest(
                draft_scores(inputs, scale),
                blocks_kept_per_row(layout.num_video_blocks, sparsity),
                bias=log_block_sizes(layout),
                keep_diagonal=True,
                dense_tail=num_text_blocks,
            )
        else:
            rank = entries_dropped_per_head(layout.num_video_blocks, sparsity)
            selection = select_from_rank(draft_map(inputs, scale), rank, dense_tail=num_text_blocks)
        mask = BlockMask(
            selection.kv_num_blocks, selection.kv_indices, layout.offsets, inputs.key_offsets, layout.block_size
        )
        mask.__dict__["block_map"] = selection.block_map  # spares the cached property its scatter
        return mask
