"""Block masks of causal attention and of sliding windows over the last keys, which follow from lengths alone."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from draftattn.kernels.block_mask import BlockMask, SlidingWindow
from draftattn.kernels.runs import mask_of_runs

BLOCK = 128


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # a kept inference tensor would break later autograd
def causal_mask(
    num_queries: int,
    num_keys: int,
    window: int | None,
    device: torch.device,
    starts: tuple[int, ...] = (0,),
) -> BlockMask:
    """Every block that queries at the end of a sequence see. Kept for the layers to come; never waits for the device.

    Args:
        num_queries: queries, the last of which stands at the last key.
        num_keys: keys.
        window: keys that a query sees, its own among them; None for all.
        device: of the mask.
        starts: the first key of each batch item, or of all; those before it are left out.

    >>> causal_mask(200, 500, 150, torch.device("cpu")).block_map[0, 0].int().tolist()
    [[0, 1, 1, 1], [0, 0, 1, 1]]
    """
    shift = num_keys - num_queries
    query_offsets = _offsets(0, num_queries, device)
    key_offsets = torch.stack([_offsets(start, num_keys, device) for start in starts])
    # [S, 1] and [S, Q]: the keys of each item that the first and the last query of a block see
    begin = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)[:, None]
    newest = query_offsets[1:] + (shift - 1) - begin
    if window is None:
        first, longest, rule, shifts = torch.zeros_like(newest), key_offsets.shape[1] - 1, None, None
    else:
        first = (query_offsets[:-1] + (shift - window + 1) - begin).clamp_(min=0) // BLOCK
        longest, rule = -(-(window - 1) // BLOCK) + 2, SlidingWindow(window)
        shifts = torch.full((len(query_offsets) - 1,), shift, dtype=torch.int32, device=device)
    return mask_of_runs(
        first,
        newest // BLOCK - first + 1,
        longest,
        query_offsets,
        key_offsets[0] if len(starts) == 1 else key_offsets,
        BLOCK,
        query_shifts=shifts,
        window=rule,
    )


def _offsets(start: int, end: int, device: torch.device) -> Tensor:
    """Blocks of the tokens ``start : end``, as many as there would be without ``start``."""
    blocks = torch.arange(-(-end // BLOCK) + 1, dtype=torch.int32, device=device) * BLOCK
    return (blocks + start).clamp_(max=end)
