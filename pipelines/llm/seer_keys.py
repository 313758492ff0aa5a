"""What gates read and the attention function cannot see: queries and keys before rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.pipelines.llm.inputs import even_offsets
from draftattn.pipelines.llm.seer_gate import SeerGate, key_features
from draftattn.pipelines.llm.streaming_rotary import RotaryTurn
from draftattn.pipelines.llm.system import AttentionCall


class PreRotary:
    """Hooks that keep a layer's queries and keys before rotary embedding while the layer runs.

    Args:
        layers: attention modules by layer. They have ``q_proj`` and ``k_proj``, and norms after these or none.
        turn: the model's rotary embedding.

    Raises:
        InputError: if a layer has no such projections.
    """

    def __init__(self, layers: dict[int, nn.Module], turn: RotaryTurn) -> None:
        self._turn = turn
        self._kept: dict[int, dict[str, Tensor | None]] = {layer: {} for layer in layers}
        self._hooks: list[Any] = []
        sources = {layer: _sources(layer, module) for layer, module in layers.items()}
        for layer, module in layers.items():
            for name, source in zip(("query", "key"), sources[layer], strict=True):
                self._hooks.append(source.register_forward_hook(_Keep(self._kept[layer], name)))
            before, after = _Before(self, layer), _After(self, layer)
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(after, always_call=True))

    def close(self) -> None:
        """Takes the hooks out."""
        while self._hooks:
            self._hooks.pop().remove()

    def query(self, call: AttentionCall) -> Tensor:
        """The queries of a call, ``[B, N, H, D]``."""
        return self._part(call, "query")

    def new_key(self, call: AttentionCall) -> Tensor:
        """The keys of a call's own tokens, ``[B, N, H_kv, D]``."""
        return self._part(call, "key")

    def cached_key(self, call: AttentionCall) -> Tensor:
        """The keys of the tokens before a call's own, ``[B, K - N, H_kv, D]``, turned back from the cache."""
        positions = self._kept[call.layer]["positions"]
        if positions is None:
            raise InputError("the model tells its attention no position_ids, which keys from a cache need")
        batch = call.query.shape[0] if call.items is None else max(call.items) + 1
        first = call.take(positions.expand(max(batch, len(positions)), -1))[:, :1]
        away = torch.arange(call.query_offset, device=first.device) - call.query_offset
        return self._turn(call.key[:, : call.query_offset], -(first + away)) / self._turn.scaling

    def _part(self, call: AttentionCall, name: str) -> Tensor:
        x = self._kept[call.layer][name]
        assert x is not None
        return call.take(x.reshape(*x.shape[:2], -1, call.query.shape[-1]))

    def before(self, layer: int, kwargs: dict[str, Any]) -> None:
        """A layer begins."""
        self._kept[layer]["positions"] = kwargs.get("position_ids")

    def after(self, layer: int) -> None:
        """A layer ends."""
        self._kept[layer].clear()


@dataclass(frozen=True)
class _Keep:
    kept: dict[str, Tensor | None]
    name: str

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept[self.name] = output


@dataclass(frozen=True)
class _Before:
    owner: PreRotary
    layer: int

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.owner.before(self.layer, kwargs)


@dataclass(frozen=True)
class _After:
    owner: PreRotary
    layer: int

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.owner.after(self.layer)


def _sources(layer: int, module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The last modules that queries and keys pass before rotary embedding."""
    found = []
    for name in ("q", "k"):
        source = getattr(module, f"{name}_norm", None) or getattr(module, f"{name}_proj", None)
        if not isinstance(source, nn.Module):
            raise InputError(
                f"layer {layer} is a {type(module).__name__} without {name}_proj; gates read the queries and keys of "
                "layers that have q_proj and k_proj, such as those of Llama, Qwen2, Qwen3 and Mistral"
            )
        found.append(source)
    return found[0], found[1]


@dataclass
class CompressedKeys:
    """The keys of a text as a gate compares them: whole blocks compressed, the rest as it is.

    Args:
        gate: the gate.
        blocks: ``[B, n, H_kv, gate_dim]``.
        remainder: keys after the last whole block, before rotary embedding, ``[B, < block_size, H_kv, D]``.
    """

    gate: SeerGate
    blocks: Tensor
    remainder: Tensor

    @classmethod
    def empty(cls, gate: SeerGate, like: Tensor) -> CompressedKeys:
        """For keys like these, ``[B, N, H_kv, D]``."""
        blocks = like.new_empty(len(like), 0, like.shape[2], gate.shape.gate_dim, dtype=torch.float32)
        return cls(gate, blocks, like[:, :0])

    @property
    def num_tokens(self) -> int:
        """Tokens seen."""
        return self.blocks.shape[1] * self.gate.shape.block_size + self.remainder.shape[1]

    def extend(self, key: Tensor) -> None:
        """Takes the keys of new tokens, ``[B, N, H_kv, D]``, before rotary embedding."""
        block_size = self.gate.shape.block_size
        key = torch.cat([self.remainder, key], dim=1)
        whole = key.shape[1] // block_size * block_size
        if whole:
            features = key_features(key[:, :whole], even_offsets(whole, block_size, key.device), block_size)
            blocks = self.gate.compress(features, first_block=self.blocks.shape[1])
            self.blocks = torch.cat([self.blocks, blocks], dim=1)
        self.remainder = key[:, whole:].clone() if whole else key
