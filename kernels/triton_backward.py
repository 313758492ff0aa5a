"""Gradients of block-sparse attention in portable Triton: dq over query blocks, dk and dv over key blocks.

Scores are computed again from the forward's log-sum-exp, once per kernel, so that every sum is taken by one program in
a fixed order: no atomics, and the same bits on every run. With ``p`` the probabilities,

    dv = pᵀ dout,    ds = p ∘ (dout vᵀ - delta),    dq = scale · ds k,    dk = scale · dsᵀ q,
    delta = rowsum(dout ∘ out) - dlse.

Products take ``p`` and ``ds`` rounded to the inputs' dtype and sum in float32, as torch's flash attention does.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftattn.kernels.transposed import transposed_lists
from draftattn.kernels.triton_gradients import (
    key_gradient_kernel,
    mean_gradient_kernel,
    query_gradient_kernel,
    row_terms_kernel,
)
from draftattn.kernels.triton_launch import contiguous_last, num_multiprocessors, shared_memory

if TYPE_CHECKING:
    from draftattn.kernels.api import BlockMeans
    from draftattn.kernels.block_mask import BlockMask

_LOG2_E = 1.4426950408889634


class AttentionGradients(NamedTuple):
    """Gradients of the inputs, in their shapes and dtypes; the last two are None without a residual."""

    query: Tensor
    key: Tensor
    value: Tensor
    mean_key: Tensor | None
    mean_value: Tensor | None


class Tiling(NamedTuple):
    """Rows and columns of a score tile, and launch options of one program."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


class Tilings(NamedTuple):
    """Tilings of the two kernels: the first holds rows and walks over columns, the second the other way round."""

    query: Tiling
    key: Tiling


def choose_tilings(dtype: torch.dtype, head_dim: int, shared_memory: int) -> Tilings:
    """The tilings for a dtype and head dimension on a GPU with ``shared_memory`` bytes per program.

    ============  ===========================  ===========================
    head_dim      16-bit, at least 200 KB      16-bit, less (fits 99 KB)
    ============  ===========================  ===========================
    up to 64      dq 128 × 128, dk 64 × 128     dq 128 × 64, dk 64 × 128
    up to 128     dq 128 × 64, dk 64 × 128      dq 128 × 32, dk 64 × 64
    up to 256     dq 128 × 32, dk 32 × 32       dq 64 × 32, dk 32 × 32
    ============  ===========================  ===========================

    Rows are queries and columns keys. What bounds them are the sums in registers: of 128 × 128 numbers dq has one and
    dk with dv two. fp32 runs on the ordinary cores, which take whole rows of both operands into registers.
    """
    large = shared_memory >= 200 * 1024
    if dtype == torch.float32:
        if head_dim <= 64:
            return Tilings(Tiling(64, 32, 8, 1), Tiling(32, 32, 8, 1))
        if head_dim <= 128:
            return Tilings(Tiling(32, 16, 8, 1), Tiling(16, 32, 8, 1))
        return Tilings(Tiling(16, 16, 8, 1), Tiling(16, 16, 8, 1))
    if head_dim <= 64:
        return Tilings(Tiling(128, 128 if large else 64, 8, 2), Tiling(64, 128, 8, 3 if large else 2))
    if head_dim <= 128:
        if large:
            return Tilings(Tiling(128, 64, 8, 3), Tiling(64, 128, 8, 3))
        return Tilings(Tiling(128, 32, 8, 2), Tiling(64, 64, 8, 2))
    return Tilings(Tiling(128, 32, 8, 2) if large else Tiling(64, 32, 8, 1), Tiling(32, 32, 8, 1))


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    causal: bool,
    residual: BlockMeans | None = None,
    query_lists: tuple[Tensor, Tensor] | None = None,
    tilings: Tilings | None = None,
    descriptors: bool | None = None,
) -> AttentionGradients:
    """Gradients of ``block_sparse_attention``. The host never waits for the device; a repeat gives the same bits.

    Args:
        grad_out: gradient of the output, ``[B, S_q, H, D]``.
        grad_lse: gradient of the log-sum-exp, ``[B, H, S_q]``, or None for zeros.
        query, key, value, block_mask, scale, causal, residual: what the forward was called with.
        out: the forward's output.
        lse: the forward's log-sum-exp.
        query_lists: `transposed_lists` of the mask, where they are at hand.
        tilings: tile sizes, `choose_tilings` if None.
        descriptors: whether tiles come through TMA, wherever the hardware and the strides allow it if None.
    """
    batch, query_length, heads, head_dim = query.shape
    key_length, key_heads = key.shape[1:3]
    group = heads // key_heads
    device = query.device
    num_query_blocks, num_key_blocks = block_mask.num_query_blocks, block_mask.num_key_blocks
    if query.numel() == 0 or key.numel() == 0 or num_query_blocks == 0 or num_key_blocks == 0:
        zeros = [torch.zeros(x.shape, dtype=x.dtype, device=device) for x in (query, key, value, *(residual or ()))]
        return AttentionGradients(*zeros, *([] if residual else [None, None]))

    tilings = choose_tilings(query.dtype, head_dim, shared_memory(device)) if tilings is None else tilings
    grad_out, query, key, value = (contiguous_last(x) for x in (grad_out, query, key, value))
    counts, ids = block_mask.kv_num_blocks.contiguous(), block_mask.kv_indices.contiguous()
    column_counts, column_ids = (
        x.contiguous() for x in (transposed_lists(block_mask) if query_lists is None else query_lists)
    )
    query_offsets, key_offsets = block_mask.query_offsets.contiguous(), block_mask.key_offsets.contiguous()
    mask_batch, mask_heads = counts.shape[:2]
    window = block_mask.window
    shifts = None if block_mask.query_shifts is None else block_mask.query_shifts.contiguous()
    starts = None if window is None or window.starts is None else window.starts.contiguous()
    whole = None if window is None or window.whole is None else block_mask.whole_map.contiguous().view(torch.uint8)

    if descriptors is None:
        descriptors = _has_tma(device) and all(_is_described(x) for x in (query, key, value, grad_out))
    if descriptors:
        triton.set_allocator(_allocate)

    # rows of a block in the terms: every tile of a block ends within them
    block_rows = max(16, triton.next_power_of_2(block_mask.largest_query_block))
    terms = torch.empty(2, batch, heads, num_query_blocks, block_rows, dtype=torch.float32, device=device).unbind()
    grad_query, grad_key, grad_value = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (query, key, value))
    if grad_lse is None:
        grad_lse = torch.zeros((), dtype=torch.float32, device=device).expand(lse.shape)

    # what stands in for an absent tensor is never read
    rows = (query_offsets, key_offsets, *(query_offsets if x is None else x for x in (shifts, starts, whole)))
    per_item = [x.stride(0) if x is not None and x.ndim == 2 else 0 for x in (key_offsets, shifts, starts)]
    row_strides = (mask_heads * num_query_blocks if mask_batch > 1 else 0, num_query_blocks if mask_heads > 1 else 0)
    column_strides = (mask_heads * num_key_blocks if mask_batch > 1 else 0, num_key_blocks if mask_heads > 1 else 0)
    # a mask's heads are one, the key heads or all heads
    pack = group if mask_heads < heads else 1
    scales = (scale, scale * _LOG2_E)
    sizes = (
        heads, group, heads // mask_heads, query_length, key_length, num_query_blocks, num_key_blocks,
    )  # fmt: skip
    window_sizes = (0, 0) if window is None else (window.size, window.sink)
    constants = dict(D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_L=block_rows)
    constants |= dict(CAUSAL=causal, SHIFTED=shifts is not None)
    flags = dict(WINDOW=window is not None, STARTS=starts is not None, WHOLE=whole is not None)
    strides = [stride for x in (query, key, value, grad_out) for stride in x.stride()[:3]]
    block_map, means = counts, [key, value]
    if residual is not None:
        block_map = block_mask.block_map.contiguous().view(torch.uint8)
        means = [x.contiguous() for x in residual]

    with torch.cuda.device_of(query):
        row_terms_kernel[(num_query_blocks, heads, batch)](
            out.contiguous(), grad_out, lse.contiguous(), grad_lse, *terms, query_offsets,
            *grad_out.stride()[:3], *grad_lse.stride(), heads, query_length, num_query_blocks,
            D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_L=block_rows,
        )  # fmt: skip

        shape = _launch_options(tilings.key, block_mask, pack, holds_rows=False)
        key_gradient_kernel[(num_key_blocks * shape["TILES_N"] + 1, key_heads, batch)](
            query, key, value, grad_out, *terms, grad_key, grad_value,
            column_counts, column_ids, *rows,
            *strides, *row_strides, *column_strides, column_ids.shape[-1], *per_item,
            *scales, *window_sizes, *sizes,
            **constants, **flags, **shape, DESCRIPTORS=descriptors and shape["PACK"] == 1,
        )  # fmt: skip

        shape = _launch_options(tilings.query, block_mask, pack, holds_rows=True)
        query_gradient_kernel[(num_query_blocks * shape["TILES_M"] + 1, heads // shape["PACK"], batch)](
            query, key, value, grad_out, *terms, grad_query,
            counts, ids, *rows, *means, block_map,
            *strides, *row_strides, ids.shape[-1], *per_item,
            *scales, *window_sizes, *sizes,
            **constants, **flags, **shape,
            DESCRIPTORS=descriptors, BLOCK_R=tilings.query.columns, RESIDUAL=residual is not None,
        )  # fmt: skip

        if residual is None:
            return AttentionGradients(grad_query, grad_key, grad_value, None, None)
        shape = _launch_options(tilings.key, block_mask, pack, holds_rows=False)
        columns = tilings.key.columns
        tiles = triton.cdiv(num_key_blocks, columns)
        # several programs share the query blocks, so that they fill the device
        parts = min(num_query_blocks, triton.cdiv(4 * num_multiprocessors(device), tiles * key_heads * batch))
        sums = torch.empty(2, parts, *residual.key.shape, dtype=torch.float32, device=device)
        mean_gradient_kernel[(tiles, key_heads, batch * parts)](
            query, *means, grad_out, *terms, *sums,
            block_map, query_offsets, key_offsets, rows[2],
            *query.stride()[:3], *grad_out.stride()[:3], *row_strides, *per_item[:2],
            *scales, batch, *sizes, triton.cdiv(num_query_blocks, parts),
            **constants, BLOCK_M=shape["BLOCK_M"], BLOCK_R=columns, TILES_M=shape["TILES_M"], PACK=shape["PACK"],
            DESCRIPTORS=descriptors and shape["PACK"] == 1,
            num_warps=tilings.key.num_warps, num_stages=tilings.key.num_stages,
        )  # fmt: skip
    mean_gradients = (parts_of_one.sum(0).to(query.dtype) for parts_of_one in sums)
    return AttentionGradients(grad_query, grad_key, grad_value, *mean_gradients)


def _launch_options(tiling: Tiling, block_mask: BlockMask, pack: int, holds_rows: bool) -> dict[str, int]:
    """Constants of a launch: blocks shorter than a tile shrink it, and the program if they shrink what it holds.

    ``pack`` heads of a group, which share a pattern, are rows of one tile where a block of them fits.
    """
    longest = block_mask.largest_query_block
    pack = pack if longest * pack <= tiling.rows else 1
    rows = min(tiling.rows, max(16, triton.next_power_of_2(longest * pack)))
    columns = min(tiling.columns, max(16, triton.next_power_of_2(block_mask.block_size)))
    shrunk = rows < tiling.rows if holds_rows else columns < tiling.columns
    return dict(
        BLOCK_M=rows,
        BLOCK_N=columns,
        TILES_M=triton.cdiv(longest * pack, rows),
        TILES_N=triton.cdiv(block_mask.block_size, columns),
        PACK=pack,
        num_warps=4 if shrunk else tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def _is_described(x: Tensor) -> bool:
    """Whether TMA can read rows of a tensor: 16-bit numbers, 16-byte steps, nothing expanded."""
    steps = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    fits = x.element_size() == 2 and x.shape[-1] == triton.next_power_of_2(x.shape[-1]) and x.data_ptr() % 16 == 0
    return fits and all(step > 0 and step % 8 == 0 for step in steps)


@functools.cache
def _has_tma(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return False
    if not (hasattr(tl, "make_tensor_descriptor") and hasattr(triton, "set_allocator")):
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that programs make."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
