"""SeerAttention: learned gates choose the blocks of a stock model's attention, in prefill and in decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from draftattn.errors import InputError
from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.selection import select_largest
from draftattn.pipelines.llm.apply import attention_layers
from draftattn.pipelines.llm.beside_cache import BesideCache
from draftattn.pipelines.llm.dense import dense_attention
from draftattn.pipelines.llm.inputs import CausalInputs, even_offsets
from draftattn.pipelines.llm.seer_gate import SeerGate, key_features
from draftattn.pipelines.llm.seer_keys import CompressedKeys, PreRotary
from draftattn.pipelines.llm.seer_selection import select_by_ratio, select_by_threshold
from draftattn.pipelines.llm.seer_weights import load_gates
from draftattn.pipelines.llm.streaming_rotary import rotary_turn
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem, SystemConfig

_PUBLISHED_THRESHOLD = 5e-4


@dataclass(frozen=True)
class SeerConfig(SystemConfig):
    """Settings of SeerAttention (arXiv 2410.13276) and SeerAttention-R (arXiv 2506.08889).

    Args:
        gates: folder of gates that ``distill`` made: of the prefill form, the decode form, or both. Prefill or decoding
            without gates, and layers without gates, stay dense.
        threshold: prefill keeps the blocks to which the gate gives more than this share of a row; None with ``ratio``,
            else 5e-4.
        ratio: prefill keeps this share of the blocks that a row may see, instead of those over a threshold.
        dense_tail: last rows of blocks of a prompt that stay dense.
        decode_budget: tokens that a single query sees at most, in whole blocks, the last block always among them.
        decode_threshold: instead of the budget, the share of a row that a block must be given.
    """

    gates: str = ""
    threshold: float | None = None
    ratio: float | None = None
    dense_tail: int = 2
    decode_budget: int = 4096
    decode_threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gates", str(self.gates))
        if not self.gates:
            raise InputError("gates names no folder; give one that `draftattn llm distill` made")
        if self.threshold is not None and self.ratio is not None:
            raise InputError(f"threshold {self.threshold} and ratio {self.ratio} are both given; one of them chooses")
        for name in ("threshold", "ratio", "decode_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name} is {value}; allowed is 0 to 1")
        if self.dense_tail < 0 or self.decode_budget < 1:
            raise InputError(
                f"dense_tail is {self.dense_tail} and decode_budget {self.decode_budget}; allowed are 0 or more and 1 "
                "or more"
            )


class Seer(AttentionSystem):
    """``apply(model, "seer", gates="folder", ratio=0.25)``. See `SeerConfig`; `distill` makes gates.

    Gates read queries and keys before rotary embedding, through hooks on the projections. In decoding a layer keeps
    its whole key blocks as the gate compares them, beside the cache; where a cache was changed from outside (beam
    search) or filled without gates, they are made again from the keys in it.
    """

    name: ClassVar[str] = "seer"
    config_class: ClassVar[type[SystemConfig]] = SeerConfig

    def __init__(self, config: SeerConfig) -> None:
        super().__init__(config)
        folder = Path(config.gates)
        prefill, decode = load_gates(folder, "prefill"), load_gates(folder, "decode")
        if prefill is None and decode is None:
            raise InputError(f"gates {config.gates!r} holds no gates; give a folder that `draftattn llm distill` made")
        self._prefill: dict[int, SeerGate] = {} if prefill is None else prefill.gates
        self._decode: dict[int, SeerGate] = {} if decode is None else decode.gates
        # single queries must come here for the compressed keys to stay complete
        self.sparse_decode = bool(self._decode)  # type: ignore[misc]
        self._pre: PreRotary | None = None
        self._beside: BesideCache[CompressedKeys] | None = None

    def attach(self, model: nn.Module, layers: dict[int, nn.Module]) -> None:
        """Checks that the gates fit, moves them to the model and hooks the projections."""
        assert isinstance(model, PreTrainedModel)
        gated = sorted({*self._prefill, *self._decode})
        known = attention_layers(model)
        if missing := [layer for layer in gated if layer not in known]:
            raise InputError(f"gates are for layer {missing[0]}; the model has layers 0 to {max(known)}")
        for gate in (*self._prefill.values(), *self._decode.values()):
            self._check_fits(gate, model)
        hooked = {layer: layers[layer] for layer in gated if layer in layers}
        self._pre = PreRotary(hooked, rotary_turn(model))
        self._beside = BesideCache({layer: hooked[layer] for layer in self._decode if layer in hooked})
        for gates in (self._prefill, self._decode):
            for layer, module in hooked.items():
                if layer in gates:
                    gates[layer].to(next(module.parameters()).device).requires_grad_(False)

    def _check_fits(self, gate: SeerGate, model: PreTrainedModel) -> None:
        text = model.config.get_text_config(decoder=True)
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        shape = gate.shape
        if (shape.num_heads, shape.num_kv_heads, shape.head_dim) != (heads, kv_heads, head_dim):
            raise InputError(
                f"gates are for {shape.num_heads} query heads, {shape.num_kv_heads} key heads and head_dim "
                f"{shape.head_dim}; the model has {heads}, {kv_heads} and {head_dim}"
            )

    def detach(self) -> None:
        """Takes the hooks out."""
        if self._pre is not None:
            self._pre.close()
        if self._beside is not None:
            self._beside.close()

    def serves(self, call: AttentionCall) -> bool:
        """Calls of layers with gates; those of the decode form see all calls, to know the keys."""
        if call.layer in self._decode:
            return True
        return call.layer in self._prefill and self._is_sparse_prefill(call)

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionSystem.attend`."""
        compressed = self._compress(call) if call.layer in self._decode else None
        if call.num_queries == 1 and compressed is not None and self._is_sparse_decode(call):
            mask = self._decode_mask(call, compressed)
        elif call.layer in self._prefill and self._is_sparse_prefill(call):
            mask = self._prefill_mask(call)
        else:
            if call.recorder is not None:
                call.recorder.record_dense(call.layer, call.num_queries, call.num_keys, call.query.shape[0])
            return dense_attention(call.query, call.key, call.value, call.scale)
        call.record(mask)
        return block_sparse_attention(call.query, call.key, call.value, mask, scale=call.scale, causal=True)

    def _is_sparse_prefill(self, call: AttentionCall) -> bool:
        block_size = self._prefill[call.layer].shape.block_size
        num_rows = -(-call.num_keys // block_size) - call.query_offset // block_size
        return call.num_queries > 1 and num_rows > self.config.dense_tail and super().serves(call)

    def _is_sparse_decode(self, call: AttentionCall) -> bool:
        if call.num_keys <= self.config.dense_len:
            return False
        return self.config.decode_threshold is not None or call.num_keys > self.config.decode_budget

    def _prefill_mask(self, call: AttentionCall) -> BlockMask:
        assert self._pre is not None
        gate, config = self._prefill[call.layer], self.config
        inputs = CausalInputs(call.query, call.key, call.value, gate.shape.block_size)
        scores = self._prefill_scores(call, gate, inputs)
        if config.ratio is not None:
            kept = select_by_ratio(scores, inputs.visible, inputs.diagonal, config.ratio, config.dense_tail)
        else:
            threshold = _PUBLISHED_THRESHOLD if config.threshold is None else config.threshold
            kept = select_by_threshold(scores, inputs.visible, inputs.diagonal, threshold, config.dense_tail)
        return inputs.block_mask(kept)

    def _prefill_scores(self, call: AttentionCall, gate: SeerGate, inputs: CausalInputs) -> Tensor:
        """Scores ``[B, H, Q, K]`` of the blocks of a call."""
        assert self._pre is not None
        key = self._pre.new_key(call)
        if call.query_offset:
            key = torch.cat([self._pre.cached_key(call).to(key.dtype), key], dim=1)
        block_size = gate.shape.block_size
        pooled = CausalInputs(self._pre.query(call), key, key, block_size)
        compressed = gate.compress(key_features(key, inputs.key_offsets, block_size))
        return gate.scores(pooled.mean_query, compressed, inputs.first_block)

    def _compress(self, call: AttentionCall) -> CompressedKeys:
        """The compressed keys of a call, its own among them."""
        assert self._pre is not None
        assert self._beside is not None
        own, compressed = self._pre.new_key(call), self._beside.take(call)
        if compressed is None:
            compressed = CompressedKeys.empty(self._decode[call.layer], own)
            if call.query_offset:
                compressed.extend(self._pre.cached_key(call).to(own.dtype))
        compressed.extend(own)
        self._beside.put(call, compressed)
        return compressed

    def _decode_mask(self, call: AttentionCall, compressed: CompressedKeys) -> BlockMask:
        assert self._pre is not None
        gate = self._decode[call.layer]
        block_size, device = gate.shape.block_size, call.query.device
        num_blocks = -(-call.num_keys // block_size)
        position = torch.full((1, 1), call.query_offset, device=device)
        scores = gate.scores(self._pre.query(call), compressed.blocks, position)
        incomplete = num_blocks - compressed.blocks.shape[1]
        if self.config.decode_threshold is None:
            scores = torch.nn.functional.pad(scores, (0, incomplete))
            scores[..., -1] = torch.inf
            selection = select_largest(scores, max(1, min(self.config.decode_budget // block_size, num_blocks)))
            counts, ids = selection.kv_num_blocks, selection.kv_indices
        else:
            kept = scores.softmax(-1) > self.config.decode_threshold
            kept = torch.nn.functional.pad(kept, (0, incomplete))
            kept[..., -1] = True
            mask = BlockMask.from_block_map(kept, even_offsets(1, 1, device), even_offsets(num_blocks, 1, device))
            counts, ids = mask.kv_num_blocks, mask.kv_indices
        key_offsets = even_offsets(call.num_keys, block_size, device)
        return BlockMask(counts, ids, even_offsets(1, 1, device), key_offsets, block_size, query_block_size=1)
