"""Block-sparse attention by FlashAttention-4, where the optional package ``flash-attn-4`` is installed."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from draftattn.kernels.even_blocks import TILE, TileLists, for_each_head, reasons_against_even, tile_lists

if TYPE_CHECKING:
    from draftattn.kernels.api import BlockMeans
    from draftattn.kernels.block_mask import BlockMask

PACKAGE = "flash-attn-4"
HEAD_DIMS = (64, 128)


@functools.cache
def installed_version() -> str | None:
    """Version of the package, or None where it is not installed. Importing it takes seconds; this does not."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def reasons_against_platform() -> list[str]:
    """Why FlashAttention-4 can serve no call on this machine; empty if it can."""
    reasons = []
    if installed_version() is None:
        reasons.append(f"the package {PACKAGE} is not installed (pip install --pre {PACKAGE})")
    if not torch.cuda.is_available():
        reasons.append("torch sees no CUDA device")
    return reasons


def reasons_against_fa4(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: tuple[Tensor, ...] | None = None,
    block_mask: BlockMask | None = None,
) -> list[str]:
    """Every reason why FlashAttention-4 cannot serve a call; empty if it can.

    Whether all blocks are whole is looked up on the host: the first call with new offsets waits for the device.
    """
    reasons = reasons_against_platform()
    if query.device.type != "cuda":
        reasons.append(f"tensors are on {query.device.type}, it needs a Hopper GPU")
    elif torch.version.hip or torch.cuda.get_device_capability(query.device)[0] != 9:
        name = torch.cuda.get_device_name(query.device)
        reasons.append(f"{name} is not a Hopper GPU, where its block-sparse tiles are {TILE} × {TILE}")
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {query.dtype} is not fp16 or bf16")
    if query.shape[-1] not in HEAD_DIMS:
        reasons.append(f"head_dim {query.shape[-1]} is not one of {HEAD_DIMS}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(-1) != 1:
            reasons.append(f"the last dimension of {name} is not contiguous")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *(residual or ()))):
        reasons.append("it has no backward pass for block masks here")
    if residual is not None:
        reasons.append("it knows no residual")
    if block_mask is not None:
        reasons += reasons_against_even(block_mask, query.shape[1], key.shape[1])
    return reasons


@functools.cache
def _causal_rule() -> Callable[..., Any]:
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    @cute.jit
    def is_visible(batch, head, query_index, key_index, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        shift = utils.scalar_to_ssa(seqlen_info.seqlen_k - seqlen_info.seqlen_q, cutlass.Int32)
        return key_index <= query_index + shift

    return is_visible


def tile_attention(
    query: Tensor, key: Tensor, value: Tensor, lists: TileLists | None, *, scale: float, causal: bool, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """FlashAttention-4's forward pass over the tiles of `tile_lists`, or over all with None.

    ``[B, S, H, D]`` in and out; the LSE is float32 ``[B, H, S_q]``.
    """
    from flash_attn.cute import flash_attn_func

    options: dict[str, Any] = {"softmax_scale": scale, "return_lse": return_lse}
    if lists is None:
        options["causal"] = causal
    else:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        options["block_sparse_tensors"] = BlockSparseTensorsTorch(*lists, block_size=(TILE, TILE))
        # packed query heads would need one pattern for a whole group
        options["pack_gqa"] = False
        if causal:
            options["mask_mod"] = _causal_rule()
    result = flash_attn_func(query, key, value, **options)
    output, lse = result if isinstance(result, tuple) else (result, None)
    return output, lse if return_lse else None


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    causal: bool,
    residual: BlockMeans | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a mask of whole 128-token blocks. Calls it cannot serve are named by `reasons_against_fa4`.

    See ``draftattn.kernels.api.block_sparse_attention`` for the arguments. Source: FlashAttention-4,
    https://github.com/Dao-AILab/flash-attention (``flash_attn/cute``).
    """
    assert residual is None
    lists = tile_lists(block_mask, query.shape[1], key.shape[1], causal)
    lists = for_each_head(lists, query.shape[2])
    return tile_attention(query, key, value, lists, scale=scale, causal=causal, return_lse=return_lse)
