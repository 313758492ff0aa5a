"""Native Sparse Attention of one call: three branches and their gates."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.backends import BackendName, reasons_against
from draftattn.kernels.block_mask import BlockMask
from draftattn.pipelines.llm.causal_masks import causal_mask
from draftattn.pipelines.llm.nsa_compressed_attention import attend_compressed, select_blocks
from draftattn.pipelines.llm.nsa_config import NSAConfig

_FEW_SCORES = 2**18


def nsa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    gates: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> tuple[Tensor, BlockMask]:
    """The gated sum of attention to compressed, to selected and to recent keys. Differentiable.

    The last query stands at the last key, so that cached keys may come first. Query heads that share a key head share
    the selection. The choice of blocks has no gradient; what it is made from learns through the compressed branch.

    Args:
        query: ``[B, N, H, D]``, after rotary embedding.
        key: ``[B, K, H_kv, D]``.
        value: ``[B, K, H_kv, D]``.
        compressed_key: ``[B, C, H_kv, D]``, one for every block of the compression that lies within the K keys.
        compressed_value: ``[B, C, H_kv, D]``.
        gates: ``[B, N, H, 3]``, of compression, selection and window.
        config: sizes.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        The output ``[B, N, H, D]``, and the selected blocks.

    >>> from draftattn.pipelines.llm.nsa_compression import MeanCompression
    >>> config = NSAConfig.mean_pooled(block_size=16, num_selected=3, window=8)
    >>> query, key, value = torch.randn(1, 64, 4, 32), torch.randn(1, 64, 2, 32), torch.randn(1, 64, 2, 32)
    >>> compress, gates = MeanCompression(config), torch.full((1, 64, 4, 3), 1 / 3)
    >>> output, mask = nsa_attention(query, key, value, compress(key), compress(value), gates, config)
    >>> output.shape, mask.kv_indices[0, 0, -1].tolist()[-2:]
    (torch.Size([1, 64, 4, 32]), [2, 3])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    num_queries, num_keys = query.shape[1], key.shape[1]
    first = num_keys - num_queries
    compressed, lse = attend_compressed(query, compressed_key, compressed_value, first, config, scale)
    mask = select_blocks(query, compressed_key, lse.detach(), first, num_keys, config, scale)
    backend = _backend(query, key, value)
    selected = block_sparse_attention(query, key, value, mask, scale=scale, causal=True, backend=backend)
    gate = gates.to(query.dtype)[..., None].unbind(3)
    output = torch.addcmul(gate[0] * compressed, gate[1], selected)
    if config.window:
        output = torch.addcmul(output, gate[2], _attend_to_window(query, key, value, config.window, scale, backend))
    return output, mask


def _attend_to_window(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, backend: BackendName
) -> Tensor:
    num_queries, num_keys = query.shape[1], key.shape[1]
    # what lies before the window of the first query need not be looked at
    first = max(0, num_keys - num_queries + 1 - window)
    mask = causal_mask(num_queries, num_keys - first, window, query.device)
    return block_sparse_attention(
        query, key[:, first:], value[:, first:], mask, scale=scale, causal=True, backend=backend
    )


def _backend(query: Tensor, key: Tensor, value: Tensor) -> BackendName:
    if query.is_cuda and not reasons_against("triton", query, key, value):
        # its tiles hold the heads of a group; those of the Hopper kernel hold 128 queries
        return "triton"
    if query.device.type == "cpu" and query.shape[:3].numel() * key.shape[1] <= _FEW_SCORES:
        # so few scores cost less than gathering what each query selects
        return "reference"
    return "auto"
