"""What gates learn from: pooled queries and keys of a stock model, and the attention that its blocks really got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.probabilities import block_probabilities
from draftattn.pipelines.llm.inputs import CausalInputs
from draftattn.pipelines.llm.seer_gate import GateShape, SeerGate, key_features
from draftattn.pipelines.llm.seer_keys import PreRotary
from draftattn.pipelines.llm.streaming_rotary import rotary_turn
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem, SystemConfig

_DECODE_ROWS = 1024  # single queries taken from a text, at most


class GateSample(NamedTuple):
    """One layer's attention over texts of one length, as a gate sees it and as it was.

    Args:
        query: before rotary embedding, ``[B, Q, H, D]``: block means, or single queries.
        features: of key blocks, ``[B, K, H_kv, 3 D]``.
        position: number of the first query block; of single queries their positions, ``[1, Q]``.
        visible: bool ``[Q, K]``, blocks that a row may choose.
        target: ``[B, H, Q, K]``, in the decode form ``[B, H_kv, Q, K]``: the largest probability of each pair of
            blocks, not normalised.
    """

    query: Tensor
    features: Tensor
    position: Tensor | int
    visible: Tensor
    target: Tensor

    def to(self, device: torch.device | str) -> GateSample:
        """The same on another device."""
        position = self.position.to(device) if isinstance(self.position, Tensor) else self.position
        return self._replace(
            query=self.query.to(device),
            features=self.features.to(device),
            position=position,
            visible=self.visible.to(device),
            target=self.target.to(device),
        )


def gate_loss(gate: SeerGate, sample: GateSample) -> Tensor:
    """Ten times the divergence of a gate's softmax from the target's rows, whose sum is made 1 (arXiv 2410.13276).

    The first quarter of the rows is left out: they see few blocks. So are rows that see one block only.
    """
    scores = gate.scores(sample.query, gate.compress(sample.features), sample.position)
    first = sample.visible.shape[0] // 4 if gate.shape.form == "prefill" else 0
    rows = (sample.visible.sum(-1) > 1) & (torch.arange(len(sample.visible), device=scores.device) >= first)
    visible = sample.visible[rows]
    logs = scores[:, :, rows].masked_fill(~visible, -torch.inf).log_softmax(-1)
    target = sample.target[:, :, rows] * visible
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    # where nothing is visible, zero times minus infinity would be NaN
    divergence = torch.xlogy(target, target) - target * logs.masked_fill(~visible, 0.0)
    return 10 * divergence.sum(-1).mean()


class AllSampled(Exception):
    """Ends a forward pass whose later layers nobody asked for."""


class GateTargets(AttentionSystem):
    """Computes attention densely, and hands a `GateSample` of every chosen layer to a function.

    Args:
        shape: sizes of the gates to be trained.
        layers: the layers wanted.
        take: called with the number of a layer and its sample.
        seed: of the choice of single queries.
        stop: whether to end the forward pass after the last chosen layer, by raising `AllSampled`.
    """

    name: ClassVar[str] = "seer targets"

    def __init__(
        self,
        shape: GateShape,
        layers: tuple[int, ...],
        take: Callable[[int, GateSample], None],
        seed: int = 0,
        stop: bool = False,
    ) -> None:
        super().__init__(SystemConfig())
        self._shape, self._layers, self._take, self._stop = shape, layers, take, stop
        self._generator = torch.Generator().manual_seed(seed)
        self._pre: PreRotary | None = None

    def attach(self, model: nn.Module, layers: dict[int, nn.Module]) -> None:
        """Hooks the projections of the chosen layers."""
        chosen = {layer: layers[layer] for layer in self._layers}
        turn: Any = rotary_turn(model)  # type: ignore[arg-type]
        self._pre = PreRotary(chosen, turn)

    def detach(self) -> None:
        """Takes the hooks out."""
        if self._pre is not None:
            self._pre.close()

    def serves(self, call: AttentionCall) -> bool:
        """The chosen layers."""
        return call.layer in self._layers

    def attend(self, call: AttentionCall) -> Tensor:
        """Dense attention, through the kernel, for its LSE."""
        assert self._pre is not None
        shape = self._shape
        inputs = CausalInputs(call.query, call.key, call.value, shape.block_size)
        everything = inputs.block_mask(inputs.visible)
        output, lse = block_sparse_attention(
            call.query, call.key, call.value, everything, scale=call.scale, causal=True, return_lse=True
        )
        key = self._pre.new_key(call)
        features = key_features(key, inputs.key_offsets, shape.block_size)
        pre_query = self._pre.query(call)
        if shape.form == "prefill":
            pooled = CausalInputs(pre_query, key, key, shape.block_size)
            largest = block_probabilities(call.query, call.key, everything, lse, scale=call.scale, causal=True)
            sample = GateSample(pooled.mean_query, features, 0, inputs.visible[0, 0], largest)
        else:
            sample = self._single_queries(call, inputs, lse, features, pre_query)
        self._take(call.layer, sample)
        if self._stop and call.layer == max(self._layers):
            raise AllSampled
        return output

    def _single_queries(
        self, call: AttentionCall, inputs: CausalInputs, lse: Tensor, features: Tensor, pre_query: Tensor
    ) -> GateSample:
        """Some queries of the last three quarters, each with the whole blocks before it."""
        device, block_size = call.query.device, self._shape.block_size
        first = call.num_queries // 4
        count = min(_DECODE_ROWS, call.num_queries - first)
        chosen = torch.randperm(call.num_queries - first, generator=self._generator)[:count].sort().values + first
        chosen = chosen.to(device)
        rows = torch.arange(count + 1, dtype=torch.int32, device=device)
        ends = inputs.key_offsets[1:]
        visible = (ends <= chosen[:, None] + 1) & (inputs.key_offsets.diff() == block_size)
        mask = BlockMask.from_block_map(
            visible[None, None],
            rows,
            inputs.key_offsets,
            block_size,
            query_block_size=1,
            query_shifts=(chosen - rows[:-1]).int(),
        )
        largest = block_probabilities(
            call.query[:, chosen], call.key, mask, lse[:, :, chosen], scale=call.scale, causal=True
        )
        of_group = largest.unflatten(1, (call.key.shape[2], -1)).amax(2)
        return GateSample(pre_query[:, chosen], features, chosen[None], visible, of_group)
