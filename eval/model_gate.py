"""Whether draft attention computes what the model computes, before anything is timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from draftattn.config import DraftConfig
from draftattn.eval.dense_kernels import Shape, relative_error
from draftattn.eval.few_layers import block_counts, first_blocks
from draftattn.eval.stages import free
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.pipelines.video.adapter import adapter_for
from draftattn.pipelines.video.enable import enable
from draftattn.policies import make_policy
from draftattn.policy import CallContext, MaskPolicy

# A forward that skips nothing may differ from dense by a few roundings of its dtype, relative to the output.
GATE = {
    torch.float32: 1e-5,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}
GATE_BLOCKS = 2


def attention_shape(transformer: nn.Module, arguments: dict[str, Any], config: DraftConfig) -> Shape:
    """Shape of the self-attention call of a forward, padded text left out, from a pass through one block."""
    seen: list[Shape] = []

    class Recorder:
        """Chooses what the config says, and notes the shape."""

        def __init__(self, policy: MaskPolicy) -> None:
            self._policy = policy

        def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
            tokens, heads, head_dim = inputs.query.shape[1:]
            seen.append(Shape(tokens, inputs.key.shape[1], heads, head_dim))
            return self._policy(inputs, context, scale)

    with first_blocks(transformer, 1):
        sparse = replace(config, sparsity=0.9, dense_layers=())
        with enable(transformer, sparse, policy=Recorder(make_policy(sparse))):
            transformer(**arguments)
    return seen[0]


class Reference(NamedTuple):
    """What stock attention gives on the first blocks.

    Args:
        arguments: of the forward.
        output: of the forward.
        blocks: how many of each list took part.
    """

    arguments: dict[str, Any]
    output: Tensor
    blocks: dict[str, int]


def stock_reference(transformer: nn.Module, arguments: dict[str, Any]) -> Reference:
    """Runs the first blocks with stock attention.

    Where that needs more memory than there is, the video is halved in length until it fits.
    """
    blocks = {name: min(GATE_BLOCKS, count) for name, count in block_counts(transformer).items()}
    with first_blocks(transformer, blocks):
        while True:
            latents = arguments["hidden_states"]
            try:
                return Reference(arguments, transformer(**arguments)[0], blocks)
            except torch.OutOfMemoryError:
                if latents.shape[2] == 1:
                    raise
            free(latents.device)
            arguments = {**arguments, "hidden_states": latents[:, :, : latents.shape[2] // 2]}


def check_gate(
    transformer: nn.Module, reference: Reference, dense: DraftConfig, nothing_dropped: DraftConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Compares the two configs with stock attention on the first blocks.

    Returns:
        Errors relative to the output, what is allowed, and what was compared.

    Raises:
        RuntimeError: if an error is larger; nothing may be timed then.
    """
    arguments, expected, blocks = reference
    errors = {}
    with first_blocks(transformer, blocks):
        layers = tuple(range(len(adapter_for(type(transformer).__name__).attention_layers(transformer))))
        for name, config in (("draft", nothing_dropped), ("dense", replace(dense, dense_layers=layers))):
            with enable(transformer, config):
                errors[name] = relative_error(transformer(**arguments)[0], expected)
    allowed = GATE[dtype]
    for name, error in errors.items():
        if not error <= allowed:
            words = "sparsity 0" if name == "draft" else f"dense attention on {dense.dense_backend}"
            raise RuntimeError(f"{words} differs from dense by {error:.2e}, more than {allowed:.0e}; nothing is timed")
    return {
        "relative_error": errors["draft"],
        "dense_relative_error": errors["dense"],
        "allowed": allowed,
        "blocks": blocks,
        "latent_frames": arguments["hidden_states"].shape[2],
    }
