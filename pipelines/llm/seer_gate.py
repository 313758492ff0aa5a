"""SeerAttention's gates: small learned maps from pooled queries and keys to scores of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.kernels.pooling import PoolRequest, pool_together
from draftattn.pipelines.llm.streaming_rotary import RotaryTurn

GateForm = Literal["prefill", "decode"]


@dataclass(frozen=True)
class GateShape:
    """Sizes of a gate.

    Args:
        form: ``"prefill"`` scores blocks of queries per query head, ``"decode"`` single queries per key head.
        block_size: tokens of a block, at most 128.
        gate_dim: channels in which a gate compares queries and keys; even.
        num_heads: query heads.
        num_kv_heads: key heads.
        head_dim: channels of a head.
    """

    form: GateForm
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 64
    gate_dim: int = 128

    def __post_init__(self) -> None:
        if self.form not in get_args(GateForm):
            raise InputError(f"form is {self.form!r}; choose from {', '.join(get_args(GateForm))}")
        if not 1 <= self.block_size <= 128:
            raise InputError(f"block_size is {self.block_size}; allowed is 1 to 128")
        if self.gate_dim < 2 or self.gate_dim % 2:
            raise InputError(f"gate_dim is {self.gate_dim}; allowed are even numbers from 2 on")


class SeerGate(nn.Module):
    r"""The gate of one layer: scores of key blocks, ``softmax`` of which says how much of the attention they hold.

    With :math:`\bar q` the mean of a block's queries before rotary embedding, and :math:`\hat k` the maximum, minimum
    and mean of a block's keys, one after the other, the score is
    :math:`R(\bar q W_q) \cdot R(\hat k W_k) / \sqrt{d}`, with a :math:`W_q` for every query head, a :math:`W_k` for
    every key head and rotary embedding :math:`R` at the first token of each block (SeerAttention, arXiv 2410.13276).
    The decode form takes single queries instead, at their own positions, and adds up :math:`q W_q` over the heads that
    share a key head (SeerAttention-R, arXiv 2506.08889).

    Args:
        shape: the sizes.
        inv_freq: frequencies of the rotary embedding, ``[gate_dim / 2]``.
        generator: of the first weights; None for a fresh one, so that torch's own is not touched.
    """

    def __init__(self, shape: GateShape, inv_freq: Tensor, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if inv_freq.shape != (shape.gate_dim // 2,):
            raise InputError(f"inv_freq has shape {list(inv_freq.shape)}; gate_dim is {shape.gate_dim}")
        self.shape = shape
        self.query_weight = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim, shape.gate_dim))
        self.key_weight = nn.Parameter(torch.empty(shape.num_kv_heads, 3 * shape.head_dim, shape.gate_dim))
        generator = torch.Generator() if generator is None else generator
        for weight in (self.query_weight, self.key_weight):
            for of_head in weight:
                nn.init.xavier_uniform_(of_head, generator=generator)
        self._turn = RotaryTurn(inv_freq)

    def compress(self, features: Tensor, first_block: int = 0) -> Tensor:
        """Key blocks as the gate compares them.

        Args:
            features: of consecutive blocks, ``[B, K, H_kv, 3 D]``, see `key_features`.
            first_block: number of the first of them.

        Returns:
            float32 ``[B, K, H_kv, gate_dim]``.
        """
        return self._rotated(features, self.key_weight, self._block_starts(features, first_block))

    def scores(self, query: Tensor, compressed: Tensor, positions: Tensor | int = 0) -> Tensor:
        """Scores of key blocks, without a mask.

        Args:
            query: before rotary embedding, ``[B, Q, H, D]``: means of consecutive query blocks, or single queries.
            compressed: ``[B, K, H_kv, gate_dim]``, see `compress`.
            positions: number of the first query block; of single queries their positions, int ``[B | 1, Q]``.

        Returns:
            float32 ``[B, H, Q, K]``, in the decode form ``[B, H_kv, Q, K]``.
        """
        shape = self.shape
        if isinstance(positions, int):
            positions = self._block_starts(query, positions)
        if shape.form == "prefill":
            turned = self._rotated(query, self.query_weight, positions)
            compressed = compressed.repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=2)
        else:
            grouped = query.float().unflatten(2, (shape.num_kv_heads, -1)).flatten(3)
            turned = self._rotated(grouped, self.query_weight.view(shape.num_kv_heads, -1, shape.gate_dim), positions)
        return torch.einsum("bqhd,bkhd->bhqk", turned, compressed) * shape.gate_dim**-0.5

    def _rotated(self, x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        return self._turn(torch.einsum("bnhi,hio->bnho", x.float(), weight.float()), positions)

    def _block_starts(self, x: Tensor, first_block: int) -> Tensor:
        return (torch.arange(x.shape[1], device=x.device) + first_block)[None] * self.shape.block_size

    def extra_repr(self) -> str:
        """The sizes."""
        return str(self.shape)


def key_features(key: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    """Maximum, minimum and mean of the keys of each block, one after the other.

    Args:
        key: before rotary embedding, ``[B, S, H_kv, D]``.
        offsets: int32 ``[K + 1]``.
        block_size: the most tokens any block holds.

    Returns:
        float32 ``[B, K, H_kv, 3 D]``.

    >>> key = torch.tensor([1.0, -3.0, 5.0]).view(1, 3, 1, 1)
    >>> key_features(key, torch.tensor([0, 2, 3], dtype=torch.int32), 2).tolist()
    [[[[1.0, -3.0, -1.0]], [[5.0, 5.0, 5.0]]]]
    """
    requests = [PoolRequest(x, offsets, maximum=True) for x in (key, -key)]
    pooled, negated = pool_together(requests, block_size)
    assert pooled.maximum is not None
    assert negated.maximum is not None
    return torch.cat([pooled.maximum, -negated.maximum, pooled.mean], dim=-1)


def gate_frequencies(rotary: Any, gate_dim: int, base: float) -> Tensor:
    """Frequencies of a gate's rotary embedding: the model's own where their number fits, else by its base.

    Args:
        rotary: frequencies of the model, ``[r]``.
        gate_dim: channels of the gate.
        base: base of the model's frequencies (``rope_theta``).

    >>> gate_frequencies(torch.tensor([1.0, 0.5]), 4, 10000.0).tolist()
    [1.0, 0.5]
    """
    if len(rotary) == gate_dim // 2:
        return rotary.detach().float().cpu().clone()
    return 1.0 / base ** (torch.arange(0, gate_dim, 2, dtype=torch.float32) / gate_dim)
