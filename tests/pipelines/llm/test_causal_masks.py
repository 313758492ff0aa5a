"""Masks that follow from lengths, against those made from maps of all pairs of blocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.windows import aligned_to_the_end, sliding_window_mask, visible_blocks
from draftattn.pipelines.llm.causal_masks import causal_mask
from draftattn.pipelines.llm.inputs import even_offsets

LENGTHS = [(1, 0), (900, 0), (257, 130), (128, 400), (300, 1), (999, 128)]  # queries, and keys before them
lengths = pytest.mark.parametrize(("num_queries", "before"), LENGTHS)
starts_of_items = pytest.mark.parametrize("starts", [(0,), (0, 200, 7, 999)], ids=["no padding", "padding"])


def offsets_of(num_queries: int, num_keys: int, starts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    whole = even_offsets(num_keys, 128, device)
    ends = torch.arange(len(whole), device=device, dtype=torch.int32) * 128
    keys = torch.stack([(ends + start).clamp(max=num_keys) for start in starts])
    return even_offsets(num_queries, 128, device), keys[0] if len(starts) == 1 else keys


def check(mask: BlockMask, expected: BlockMask) -> None:
    assert torch.equal(mask.block_map, expected.block_map)
    assert torch.equal(mask.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(mask.kv_indices, expected.kv_indices[..., : mask.kv_indices.shape[-1]])
    assert torch.equal(mask.query_offsets, expected.query_offsets)
    assert torch.equal(mask.key_offsets, expected.key_offsets)
    assert (mask.window, mask.block_size) == (expected.window, expected.block_size)


@starts_of_items
@pytest.mark.parametrize("window", [1, 2, 128, 129, 130, 401])
@lengths
def test_a_window(num_queries: int, before: int, window: int, starts: tuple[int, ...], lm: SimpleNamespace) -> None:
    device, num_keys = torch.device(lm.device), num_queries + before
    starts = tuple(min(start, num_keys) for start in starts)
    query_offsets, key_offsets = offsets_of(num_queries, num_keys, starts, device)
    shifts = torch.full_like(query_offsets[1:], before)
    mask = causal_mask(num_queries, num_keys, window, device, starts)
    check(mask, sliding_window_mask(query_offsets, key_offsets, window, query_shifts=shifts))
    assert mask.query_shifts is not None
    assert torch.equal(mask.query_shifts, shifts)


@starts_of_items
@lengths
def test_everything(num_queries: int, before: int, starts: tuple[int, ...], lm: SimpleNamespace) -> None:
    device, num_keys = torch.device(lm.device), num_queries + before
    starts = tuple(min(start, num_keys) for start in starts)
    query_offsets, key_offsets = offsets_of(num_queries, num_keys, starts, device)
    seen = visible_blocks(query_offsets, key_offsets, aligned_to_the_end(query_offsets, key_offsets), causal=True)
    mask = causal_mask(num_queries, num_keys, None, device, starts)
    check(mask, BlockMask.from_block_map(seen, query_offsets, key_offsets))
    assert mask.query_shifts is None  # which the fastest kernel would not take


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that an operator gives."""

    numbers = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = operator(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_a_window_is_linear_in_the_length(lm: SimpleNamespace) -> None:
    causal_mask.cache_clear()
    with Largest() as largest:
        causal_mask(128 * 1000, 128 * 1000, 257, torch.device(lm.device))
    assert largest.numbers <= 1000 * 8


def test_what_is_kept_may_meet_gradients(lm: SimpleNamespace) -> None:
    causal_mask.cache_clear()
    with torch.inference_mode():
        kept = causal_mask(6, 19, 14, torch.device(lm.device))
    assert kept is causal_mask(6, 19, 14, torch.device(lm.device))
    assert kept.query_shifts is not None
    assert not any(x.is_inference() for x in (kept.kv_indices, kept.key_offsets, kept.query_shifts))
