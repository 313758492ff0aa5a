"""Exact attention of a call and where its mass lies: what a draft estimates, at the price of attention itself."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from draftattn.inputs import AttentionInputs
from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.backends import BackendName
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.probabilities import block_probabilities
from draftattn.kernels.selection import BlockSelection
from draftattn.layout import BlockLayout
from draftattn.policies.blocks import mask_of


def exact_output(inputs: AttentionInputs, backend: BackendName, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Dense attention by a block-sparse kernel: the output ``[B, S, H, D]`` and the LSE ``[B, H, S]``."""
    mask = every_block(inputs)
    return block_sparse_attention(
        inputs.query, inputs.key, inputs.value, mask, scale=scale, return_lse=True, backend=backend
    )


def exact_mass(inputs: AttentionInputs, lse: Tensor, scale: float | None = None) -> Tensor:
    """The attention mass of every pair of blocks, float32 ``[B, H, N, N]``.

    It is the mean over the queries of a block of the probability they put on the keys of another.

    Args:
        inputs: the call.
        lse: of dense attention. With that of the same call rows sum to 1.
        scale: factor of the scores, ``D ** -0.5`` if None.
    """
    # on a CPU the kernel could only run in Triton's interpreter
    backend: Literal["auto", "reference"] = "reference" if inputs.query.device.type == "cpu" else "auto"
    return block_probabilities(
        inputs.query, inputs.key, every_block(inputs), lse, scale=scale, reduce="sum", backend=backend
    )


def every_block(inputs: AttentionInputs) -> BlockMask:
    """A mask that skips nothing."""
    return mask_of(_every_pair(inputs.layout), inputs)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def _every_pair(layout: BlockLayout) -> BlockSelection:
    count, device = layout.num_blocks, layout.offsets.device
    ids = torch.arange(count, dtype=torch.int32, device=device).expand(1, 1, count, count).contiguous()
    counts = torch.full((1, 1, count), count, dtype=torch.int32, device=device)
    return BlockSelection(counts, ids, torch.ones(1, 1, count, count, dtype=torch.bool, device=device))
