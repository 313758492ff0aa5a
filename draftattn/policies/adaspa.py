"""AdaSpa: blocks searched exactly, while a step is dense, and used for the steps after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import BlockSelection
from draftattn.policies.blocks import budget, mask_of, rank_in_row, with_dense_text
from draftattn.policies.exact import exact_mass, exact_output
from draftattn.policies.memory import Memory, Remembered
from draftattn.policy import CallContext


@dataclass(frozen=True)
class AdaSpaConfig:
    """AdaSpa (arXiv 2502.21079): exact block search in few steps, with the LSE of an earlier one, masks reused.

    The last dense step of the warm-up keeps its LSE and searches: every row takes the blocks with the largest exact
    attention mass. The mask serves the steps that follow, until ``search_every`` of the run has passed; then the blocks
    are searched anew, with the LSE of the first search, which spares half of the work. A run without dense steps
    searches in its first sparse one. Text is dense.

    Heads get budgets by need, their mean stays: with `DraftConfig.sparsity` s, the n heads that keep the highest share
    of their mass take the sparsity (1 + s) / 2, the n with the lowest (3 s - 1) / 2, the others s; n is the number of
    heads that keep more than ``high_recall``, at most half of all. All rows of a head keep equally many blocks.

    Args:
        search_every: share of the run's steps between searches, above 0; 1 searches once. The paper searches
            HunyuanVideo's 50 steps at 10 and 30, which is 0.4.
        high_recall: share of its mass that a head must keep to give up blocks, in [0, 1].
    """

    name: ClassVar[str] = "adaspa"
    matched_by: ClassVar[str] = "sparsity"

    search_every: float = 0.4
    high_recall: float = 0.8

    def __post_init__(self) -> None:
        if not self.search_every > 0:
            raise InputError(f"search_every of policy 'adaspa' is {self.search_every!r}; it must be above 0")
        if not 0 <= self.high_recall <= 1:
            raise InputError(f"high_recall of policy 'adaspa' is {self.high_recall!r}; it must be in [0, 1]")

    def make(self, config: DraftConfig) -> AdaSpaPolicy:
        """The policy."""
        return AdaSpaPolicy(config, self)


class _Found(NamedTuple):
    """The blocks of a search, and the LSE that it used."""

    blocks: BlockSelection
    lse: Tensor


class AdaSpaPolicy:
    """See `AdaSpaConfig`."""

    def __init__(self, config: DraftConfig, settings: AdaSpaConfig) -> None:
        self.config = config
        self.settings = settings
        self._found: Memory[_Found] = Memory()

    def observe(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> None:
        """Searches in the last dense step of the warm-up."""
        if context.step is None or context.num_steps is None:
            return
        if context.step == self.config.num_warmup_steps(context.num_steps) - 1:
            self._search(inputs, context, scale, None)

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `draftattn.policy.MaskPolicy`."""
        known = self._found.recall(inputs, context)
        if known is None:
            blocks = self._search(inputs, context, scale, None)
        elif self._is_old(known, context):
            blocks = self._search(inputs, context, scale, known.value.lse)
        else:
            blocks = known.value.blocks
        return mask_of(blocks, inputs)

    def _is_old(self, known: Remembered[_Found], context: CallContext) -> bool:
        if context.step is None or context.num_steps is None:
            return False
        return context.step - known.step >= math.ceil(self.settings.search_every * context.num_steps - 1e-9)

    def _search(
        self, inputs: AttentionInputs, context: CallContext, scale: float | None, lse: Tensor | None
    ) -> BlockSelection:
        layout, video = inputs.layout, inputs.layout.num_video_blocks
        if lse is None:
            _, lse = exact_output(inputs, self.config.backend, scale)
        mass = exact_mass(inputs, lse, scale)[..., :video, :video]
        rank = rank_in_row(mass)
        kept = budget(self.config, inputs, context)
        lengths = layout.offsets[: video + 1].diff().float()
        recall = ((mass * (rank < kept)).sum(-1) @ lengths) / (mass.sum(-1) @ lengths)
        counts = head_budgets(recall, kept, video, self.settings.high_recall)
        blocks = with_dense_text(rank < counts[..., None, None], layout, min(video, kept + kept // 2))
        self._found.keep(inputs, context, _Found(blocks, lse))
        return blocks


def head_budgets(recall: Tensor, kept: int, num_blocks: int, high_recall: float) -> Tensor:
    """Blocks that a row of each head keeps, int64 ``[B, H]``, with a mean of ``kept``; see `AdaSpaConfig`.

    Args:
        recall: ``[B, H]``, what each head keeps of its mass with ``kept`` blocks a row.
        kept: blocks a row of every head would keep.
        num_blocks: blocks there are.
        high_recall: heads above it give up blocks.

    >>> head_budgets(torch.tensor([[0.9, 0.5, 0.7, 0.6]]), 10, 100, 0.8).tolist()
    [[5, 15, 10, 10]]
    """
    heads = recall.shape[-1]
    step = min(kept // 2, num_blocks - kept)
    moved = (recall > high_recall).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = rank_in_row(recall)
    gives, takes = rank < moved, rank >= heads - moved
    return torch.full_like(rank, kept) + step * (takes.long() - gives.long())
