"""How much of the exact attention a block mask keeps, and what leaving out the rest does to the output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from draftattn.attention import attend
from draftattn.config import DraftConfig
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.layout import BlockLayout
from draftattn.policies.exact import exact_mass, exact_output


@dataclass(frozen=True)
class ExactAttention:
    """Dense attention of one call, and where its mass lies.

    Args:
        output: ``[B, S, H, D]``.
        mass: float32 ``[B, H, N, N]``: the mean over the queries of a block of the probability they put on the keys
            of another. Rows sum to 1.
    """

    output: Tensor
    mass: Tensor


def exact_attention(inputs: AttentionInputs, config: DraftConfig, scale: float | None = None) -> ExactAttention:
    """Dense attention by the kernel of ``config.backend``, and its mass for every pair of blocks.

    Memory beyond the inputs' is that of the output and the mass: scores are held some at a time.
    """
    output, lse = exact_output(inputs, config.backend, scale)
    return ExactAttention(output, exact_mass(inputs, lse, scale))


def measure_recall(
    inputs: AttentionInputs,
    mask: BlockMask,
    exact: ExactAttention,
    config: DraftConfig,
    scale: float | None = None,
    seed: int = 0,
    bounds: bool = True,
) -> dict[str, Any]:
    """The attention mass a mask keeps, against the best and a random mask of its density, and the output's error.

    All figures are means over heads, batch items and video queries; text is as dense in the others as in the mask.

    Args:
        inputs: the call.
        mask: its block mask.
        exact: dense attention of the same call, see `exact_attention`.
        config: its ``backend`` is used.
        scale: factor of the scores.
        seed: seed of the random mask.
        bounds: whether the best and a random mask are measured too.

    Returns:
        ``density`` as realised; ``recall`` of the mask, and as ``recall_per_head``; ``recall_best`` with as many
        blocks in every row, those with the largest mass; ``recall_best_per_head`` with as many in every head;
        ``recall_random`` with as many random blocks in every row. ``error``, ``error_best`` and ``error_random`` are
        the relative errors of the output where skipped blocks are dropped, and ``error_residual`` and so on where
        they contribute through their means.
    """
    layout = inputs.layout
    block_map = mask.block_map.expand(*exact.mass.shape[:2], -1, -1)
    maps = {"": block_map}
    figures: dict[str, Any] = {
        "density": float(mask.density),
        "recall_per_head": _kept(exact.mass, block_map, layout).mean(0).tolist(),
    }
    if bounds:
        generator = torch.Generator(exact.mass.device).manual_seed(seed)
        noise = torch.rand(exact.mass.shape, generator=generator, device=exact.mass.device)
        maps["_best"] = largest_per_row(exact.mass, block_map, layout)
        maps["_random"] = largest_per_row(noise, block_map, layout)
        best_per_head = largest_per_head(exact.mass, block_map, layout)
        figures["recall_best_per_head"] = float(_kept(exact.mass, best_per_head, layout).mean())
    for name, chosen in maps.items():
        figures[f"recall{name}"] = float(_kept(exact.mass, chosen, layout).mean())
        for residual in (False, True):
            output = attend(inputs, _mask_of(chosen, inputs), replace(config, residual=residual), scale=scale)
            figures[f"error{'_residual' if residual else ''}{name}"] = _relative_error(output, exact.output, layout)
    return figures


def largest_per_row(values: Tensor, block_map: Tensor, layout: BlockLayout) -> Tensor:
    """Moves the video blocks of every row of a map to those with the largest values, as many as the row had.

    Args:
        values: ``[B, H, N, N]``.
        block_map: bool, the same shape.
        layout: tells video from text blocks; text columns and rows stay as they are.
    """
    video = layout.num_video_blocks
    counts = block_map[..., :video, :video].sum(-1, keepdim=True)
    rank = values[..., :video, :video].argsort(-1, descending=True).argsort(-1)
    return _with_video(block_map, rank < counts, video)


def largest_per_head(mass: Tensor, block_map: Tensor, layout: BlockLayout) -> Tensor:
    """As `largest_per_row`, with as many blocks in every head: rows with spread attention may get more of them."""
    video = layout.num_video_blocks
    counts = block_map[..., :video, :video].sum((-1, -2))[..., None]
    weighted = mass[..., :video, :video] * layout.offsets[: video + 1].diff()[:, None]
    rank = weighted.flatten(-2).argsort(-1, descending=True).argsort(-1)
    return _with_video(block_map, (rank < counts).unflatten(-1, (video, video)), video)


def mean_figures(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of all figures for each setting, in order of appearance.

    >>> mean_figures([{"setting": "a", "layer": 0, "recall": 0.5}, {"setting": "a", "layer": 1, "recall": 0.7}])
    [{'setting': 'a', 'calls': 2, 'recall': 0.6}]
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["setting"], []).append(row)
    return [
        {"setting": name, "calls": len(group)}
        | {key: sum(row[key] for row in group) / len(group) for key in group[0] if isinstance(group[0][key], float)}
        for name, group in groups.items()
    ]


def _kept(mass: Tensor, block_map: Tensor, layout: BlockLayout) -> Tensor:
    """Mass in the chosen blocks, mean over video queries: ``[B, H]``."""
    video = layout.num_video_blocks
    lengths = layout.offsets[: video + 1].diff().float()
    per_row = (mass * block_map)[..., :video, :].sum(-1)
    return per_row @ lengths / lengths.sum()


def _with_video(block_map: Tensor, chosen: Tensor, video: int) -> Tensor:
    changed = block_map.clone()
    changed[..., :video, :video] = chosen
    return changed


def _mask_of(block_map: Tensor, inputs: AttentionInputs) -> BlockMask:
    layout = inputs.layout
    return BlockMask.from_block_map(block_map, layout.offsets, inputs.key_offsets, layout.block_size)


def _relative_error(actual: Tensor, expected: Tensor, layout: BlockLayout) -> float:
    video = layout.grid.num_tokens
    difference = actual[:, :video].float() - expected[:, :video].float()
    return float(difference.norm() / expected[:, :video].float().norm())
