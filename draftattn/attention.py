"""Draft attention on tensors: pool, choose blocks, compute."""

from __future__ import annotations

from torch import Tensor

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.inputs import AttentionInputs
from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.block_mask import BlockMask
from draftattn.layout import BlockLayout
from draftattn.policies import make_policy
from draftattn.policy import CallContext


def draft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    config: DraftConfig | None = None,
    *,
    scale: float | None = None,
    text_lengths: Tensor | None = None,
) -> Tensor:
    """Self-attention over a video whose tokens are in blocked order, computed where the draft says it matters.

    Args:
        query: ``[B, S, H, D]``: the video tokens in the order of ``layout.permutation``, then the text tokens.
        key: ``[B, S, H_kv, D]``.
        value: ``[B, S, H_kv, D]``.
        layout: the blocks, from `draftattn.block_layout`.
        config: the settings; ``warmup`` and ``dense_layers`` have no meaning here.
        scale: factor of the scores, ``D ** -0.5`` if None.
        text_lengths: ``[B]``, valid leading text tokens of each item; None if all are valid.

    Returns:
        ``[B, S, H, D]``.

    Raises:
        InputError: if the sequence does not fit the layout.

    >>> import torch
    >>> from draftattn import TokenGrid, block_layout
    >>> layout = block_layout(TokenGrid(2, 12, 20))
    >>> query, key, value = torch.randn(3, 1, layout.num_tokens, 2, 32).unbind()
    >>> draft_attention(query, key, value, layout, DraftConfig(sparsity=0.5)).shape
    torch.Size([1, 480, 2, 32])
    """
    config = DraftConfig() if config is None else config
    if query.shape[1] != layout.num_tokens or key.shape[1] != layout.num_tokens:
        raise InputError(
            f"query has {query.shape[1]} and key {key.shape[1]} tokens; the layout has {layout.num_tokens} "
            f"({layout.grid.num_tokens} video and {layout.num_text_tokens} text)"
        )
    if text_lengths is not None and layout.num_text_tokens == 0:
        raise InputError("text_lengths is given, but the layout has no text tokens")
    inputs = AttentionInputs(query, key, value, layout, text_lengths)
    mask = make_policy(config)(inputs, CallContext(), scale)
    return attend(inputs, mask, config, scale=scale)


def attend(inputs: AttentionInputs, mask: BlockMask, config: DraftConfig, *, scale: float | None = None) -> Tensor:
    """Runs the kernel of ``config.backend`` over a mask, with the residual if the config asks for it."""
    residual = None
    if config.residual:
        residual = inputs.weighted_means(scale) if config.weighted_means else inputs.block_means
    return block_sparse_attention(
        inputs.query, inputs.key, inputs.value, mask, scale=scale, residual=residual, backend=config.backend
    )
