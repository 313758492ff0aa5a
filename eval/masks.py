"""Draft maps and block masks, captured while a video is generated."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from draftattn.draft import draft_map
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.layout import BlockLayout
from draftattn.policy import CallContext, MaskPolicy, ObservingPolicy

Box = tuple[int, int, int, int, int, int]


@dataclass(frozen=True, eq=False)
class MaskRecord:
    """What one attention call looked like: the video blocks of one batch item.

    Args:
        layer: number of the attention layer.
        step: denoising step, from 0.
        heads: numbers of the heads that were kept.
        draft: float32 ``[h, V, V]``: the draft map, estimated share of a query block's attention on each key block.
        chosen: bool ``[h, V, V]``: the block pairs that were computed.
        layout: where the blocks lie.
    """

    layer: int
    step: int
    heads: tuple[int, ...]
    draft: Tensor
    chosen: Tensor
    layout: BlockLayout

    @property
    def kept(self) -> Tensor:
        """float32 ``[h, V]``: the share of each query block's draft attention that its chosen blocks hold."""
        return (self.draft * self.chosen).sum(-1)


@dataclass
class RecordingPolicy:
    """A mask policy that hands on another's masks unchanged and keeps copies of some.

    Nothing that the policy or the kernel uses is touched: the draft map is made from means of its own. Of the two
    guidance branches the conditional one is kept.

    Args:
        policy: chooses the blocks.
        layers: layers to keep.
        steps: denoising steps to keep.
        heads: heads to keep.
        records: what was kept so far.

    >>> from draftattn import DraftConfig
    >>> from draftattn.layout import TokenGrid, block_layout
    >>> from draftattn.policies.draft import DraftPolicy
    >>> layout = block_layout(TokenGrid(2, 4, 4), (1, 2, 4))
    >>> inputs = AttentionInputs(*torch.randn(3, 1, 32, 2, 16), layout)
    >>> recorder = RecordingPolicy(DraftPolicy(DraftConfig(sparsity=0.5)), layers=[0], steps=[3], heads=[1])
    >>> mask = recorder(inputs, CallContext(layer=0, step=3))
    >>> recorder.records[0].chosen.sum(-1).tolist()
    [[2, 2, 2, 2]]
    """

    policy: MaskPolicy
    layers: Collection[int]
    steps: Collection[int]
    heads: Sequence[int]
    records: list[MaskRecord] = field(default_factory=list)

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """See `MaskPolicy`."""
        mask = self.policy(inputs, context, scale)
        if context.step is not None and self._wants(context):
            self.records.append(self._record(inputs, mask, context.layer, context.step, scale))
        return mask

    def observe(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> None:
        """Hands a dense call on to a policy that looks at them."""
        if isinstance(self.policy, ObservingPolicy):
            self.policy.observe(inputs, context, scale)

    def _wants(self, context: CallContext) -> bool:
        if context.layer not in self.layers or context.step not in self.steps or context.branch == "uncond":
            return False
        return all((record.layer, record.step) != (context.layer, context.step) for record in self.records)

    def _record(
        self, inputs: AttentionInputs, mask: BlockMask, layer: int, step: int, scale: float | None
    ) -> MaskRecord:
        copy = AttentionInputs(inputs.query, inputs.key, inputs.value, inputs.layout, inputs.text_lengths)
        draft = draft_map(copy, scale)
        video_blocks = inputs.layout.num_video_blocks
        # where guidance is one batch, its last item is the conditional one
        block_map = mask.block_map[-1, :, :video_blocks, :video_blocks].expand(draft.shape[1], -1, -1)
        heads = torch.as_tensor(tuple(self.heads), device=draft.device)
        return MaskRecord(
            layer=layer,
            step=step,
            heads=tuple(self.heads),
            draft=draft[-1].index_select(0, heads).float().cpu(),
            chosen=block_map.index_select(0, heads).cpu(),
            layout=inputs.layout,
        )


def block_boxes(layout: BlockLayout) -> list[Box]:
    """The tokens of each video block: first and past-the-last frame, row and column.

    >>> from draftattn.layout import TokenGrid, block_layout
    >>> block_boxes(block_layout(TokenGrid(1, 3, 5), (1, 2, 4)))
    [(0, 1, 0, 1, 0, 2), (0, 1, 0, 1, 2, 5), (0, 1, 1, 3, 0, 2), (0, 1, 1, 3, 2, 5)]
    """
    _, height, width = layout.grid
    boxes: list[Box] = []
    permutation, offsets = layout.permutation.cpu(), layout.offsets[: layout.num_video_blocks + 1].tolist()
    for start, end in pairwise(offsets):
        tokens = permutation[start:end]
        sides = (tokens // (height * width), tokens // width % height, tokens % width)
        edges = [(int(side.min()), int(side.max()) + 1) for side in sides]
        boxes.append((*edges[0], *edges[1], *edges[2]))
    return boxes


def spread(numbers: Sequence[int], count: int) -> tuple[int, ...]:
    """A few of many, evenly spread, the first and last among them.

    >>> spread(range(12), 3), spread([4, 5], 3)
    ((0, 6, 11), (4, 5))
    """
    if len(numbers) <= count:
        return tuple(numbers)
    if count == 1:
        return (numbers[len(numbers) // 2],)
    last = len(numbers) - 1
    return tuple(numbers[(2 * i * last + count - 1) // (2 * (count - 1))] for i in range(count))


def check_numbers(name: str, numbers: Sequence[int], allowed: Sequence[int], why: str) -> tuple[int, ...]:
    """Checks chosen layers, heads or steps, and sorts them.

    Args:
        name: what they are, for the message.
        numbers: the choice.
        allowed: all there are, ascending.
        why: what sets the limits.

    Raises:
        InputError: if one is not among them, or there is none.

    >>> check_numbers("steps", [5, 3], range(3, 12), "the first 3 of 12 are dense")
    (3, 5)
    """
    if not allowed:
        raise InputError(f"there are no {name} to record: {why}")
    wrong = [number for number in numbers if number not in allowed]
    if wrong or not numbers:
        shown = ", ".join(map(str, wrong)) or "empty"
        contiguous = allowed[-1] - allowed[0] + 1 == len(allowed)
        choices = f"{allowed[0]} to {allowed[-1]}" if contiguous else ", ".join(map(str, allowed))
        raise InputError(f"{name} is {shown}; choose from {choices} ({why})")
    return tuple(sorted(set(numbers)))
