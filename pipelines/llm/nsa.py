"""Native Sparse Attention in a language model of transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.files import written_whole
from draftattn.kernels.block_mask import BlockMask
from draftattn.pipelines.llm.cache_layers import adopt_layer
from draftattn.pipelines.llm.density import causal_pairs, computed_pairs
from draftattn.pipelines.llm.nsa_attention import nsa_attention
from draftattn.pipelines.llm.nsa_cache import NSALayer
from draftattn.pipelines.llm.nsa_compression import (
    count_compressed,
    make_compression,
    tokens_of,
    visible_compressed,
)
from draftattn.pipelines.llm.nsa_config import NSAConfig
from draftattn.pipelines.llm.streaming_rotary import RotaryTurn, rotary_turn
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem

__all__ = ["NSA", "NSABranches", "NSAConfig"]

# where an attention module holds what is added to it
CHILD = "nsa"


class NSABranches(nn.Module):
    """What Native Sparse Attention adds to an attention layer: gates, and the compression of keys and values.

    Args:
        hidden_size: channels of the layer's input.
        num_heads: query heads.
        num_key_value_heads: key heads.
        head_dim: channels of a head.
        config: sizes, and what the gates begin at.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int, config: NSAConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(hidden_size, 3 * num_heads)
        nn.init.zeros_(self.gate.weight)
        with torch.no_grad():
            self.gate.bias.copy_(torch.tensor(config.gate_init).repeat(num_heads))
        self.key_compression, self.value_compression = make_compression(num_key_value_heads, head_dim, config)

    def gates(self, hidden_states: Tensor) -> Tensor:
        """``[B, N, hidden]`` to ``[B, N, H, 3]``, between 0 and 1: compression, selection, window."""
        return self.gate(hidden_states).unflatten(-1, (-1, 3)).sigmoid()

    def compress(
        self, key: Tensor, value: Tensor, start: int, first_position: Tensor, turn: RotaryTurn | None
    ) -> tuple[Tensor, Tensor]:
        """Compressed keys, in the rotation of their block's first token, and values.

        Args:
            key: rotated keys ``[B, N, H_kv, D]``, the tokens of whole blocks.
            value: ``[B, N, H_kv, D]``.
            start: index of the first of these tokens in its sequence.
            first_position: rotary position of the first token of each sequence, int ``[B]``.
            turn: moves rotated keys; not needed where the compression is a mean.

        Returns:
            ``[B, C, H_kv, D]`` each.
        """
        if key.shape[1] == 0:
            return key, value
        values = self.value_compression(value)
        if self.config.compression == "mean":
            return self.key_compression(key), values
        assert turn is not None
        token = torch.arange(key.shape[1], device=key.device) + start
        positions = first_position[:, None] + token
        keys = self.key_compression(turn(key, -positions))
        stride = self.config.compression_stride
        return turn(keys, positions[:, ::stride][:, : keys.shape[1]]), values


class NSA(AttentionSystem):
    """Native Sparse Attention (arXiv 2502.11089) in place of the attention of every layer.

    It adds parameters to the model, under ``self_attn.nsa`` of every layer: they train with the rest, and `save` writes
    them alone. A model that was trained with full attention begins close to it, by `NSAConfig.gate_init` and a
    compression that begins as the mean; what the method promises comes from training.
    """

    name = "nsa"
    config_class = NSAConfig
    sparse_decode = True

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config)
        self.branches: dict[int, NSABranches] = {}  # what is added, by layer
        self._modules: dict[int, nn.Module] = {}
        self._hooks: list[Any] = []
        self._calls: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._turn: RotaryTurn | None = None
        self._looked_at_gates = False

    def attach(self, model: nn.Module, layers: dict[int, nn.Module]) -> None:
        """Adds the parameters to every layer, from ``weights`` where the config names a file.

        Layers that they were taken out of get them back as they were.
        """
        made = {layer: self._branches(layer, module) for layer, module in layers.items()}
        turn = None if self.config.compression == "mean" else rotary_turn(model)  # type: ignore[arg-type]
        if self.config.weights is not None and self._modules != layers:
            load_branches(made, Path(self.config.weights), self.config)
        self.branches, self._turn, self._modules = made, turn, dict(layers)
        for layer, module in layers.items():
            module.add_module(CHILD, made[layer])
            self._hooks.append(module.register_forward_pre_hook(_NoteCall(self, layer), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(_ForgetCall(self, layer)))

    def detach(self) -> None:
        """Takes the parameters out of the model; ``branches`` still has them, to be saved."""
        while self._hooks:
            self._hooks.pop().remove()
        for module in self._modules.values():
            module._modules.pop(CHILD, None)
        self._calls.clear()

    def _branches(self, layer: int, module: nn.Module) -> NSABranches:
        if CHILD in module._modules:
            raise InputError(f"{type(module).__name__} already has a child {CHILD!r}; remove it first")
        config, head_dim = getattr(module, "config", None), getattr(module, "head_dim", None)
        weight = next((x for x in module.parameters() if x.is_floating_point() and x.ndim == 2), None)
        if config is None or head_dim is None or weight is None:
            raise InputError(f"{type(module).__name__} is not an attention layer with a config, head_dim and weights")
        if self._modules.get(layer) is module:
            branches = self.branches[layer]
        else:
            branches = NSABranches(
                config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head_dim, self.config
            )
        return branches.to(device=weight.device, dtype=weight.dtype)

    def parameters(self) -> list[nn.Parameter]:
        """The added parameters, for an optimizer that trains them alone."""
        return [x for branches in self.branches.values() for x in branches.parameters()]

    def save(self, path: Path | str) -> None:
        """Writes the added parameters and the config to a safetensors file; ``apply(model, "nsa", weights=path)``."""
        tensors = {
            f"{layer}.{name}": x.detach().contiguous().cpu()
            for layer, branches in self.branches.items()
            for name, x in branches.state_dict().items()
        }
        with written_whole(Path(path)) as unfinished:
            save_file(tensors, unfinished, metadata={"format": "pt", "nsa": json.dumps(_sizes(self.config))})

    def attend(self, call: AttentionCall) -> Tensor:
        """The three branches of one call."""
        if not (self._looked_at_gates or call.module.training):
            self._warn_of_untrained_gates()
        hidden_states, position_ids = self._calls[call.layer]
        branches = self.branches[call.layer]
        compressed = self._compressed(call, branches, hidden_states.shape[0], position_ids)
        gates = branches.gates(call.take(hidden_states))
        output, mask = nsa_attention(call.query, call.key, call.value, *compressed, gates, self.config, call.scale)
        if call.recorder is not None:
            call.recorder.add(
                call.layer, _pairs(call, mask, self.config) * len(call.query), call.num_queries, call.num_keys,
                len(call.query),
            )  # fmt: skip
        return output

    def _warn_of_untrained_gates(self) -> None:
        """Looks once, for that waits for the device: the weights of the gates begin as zeros."""
        self._looked_at_gates = True
        if self.config.weights is None and not any(x.gate.weight.any() for x in self.branches.values()):
            self.say_once(
                "nsa: no weights are given, so its gates are untrained; train the model with them, or give weights="
            )

    def _compressed(
        self, call: AttentionCall, branches: NSABranches, batch: int, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The compressed keys and values of a call's sequences; what the cache has of them is not made again."""
        config = self.config
        count = count_compressed(call.num_keys, config)
        cached = adopt_layer(call.cache, call.layer, NSALayer)
        done, old = 0, None
        if cached is not None:
            done, old = cached.stored(call.items, count_compressed(call.query_offset, config))
        if old is not None and done == count:
            return old
        start = done * config.compression_stride
        end = start + tokens_of(count - done, config)
        if position_ids is None:
            raise InputError("the layer was called without position_ids; NSA needs them")
        positions = call.take(position_ids.expand(batch, -1))[:, 0] - call.query_offset
        new = branches.compress(call.key[:, start:end], call.value[:, start:end], start, positions, self._turn)
        if cached is not None and not torch.is_grad_enabled():
            cached.store(call.items, batch, done, new)
        return new if old is None else (torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 1))


def _pairs(call: AttentionCall, mask: BlockMask, config: NSAConfig) -> Tensor:
    """Pairs of a query and a key, compressed ones included, that the three branches compute for one sequence."""
    num_queries, num_keys = call.num_queries, call.num_keys
    compressed = visible_compressed(call.query_offset, num_queries, config, mask.device).sum()
    before = max(0, num_keys - config.window)
    near = causal_pairs(num_queries, num_keys) - causal_pairs(min(num_queries, before), before)
    return computed_pairs(mask, num_queries, num_keys) + compressed + near


class _NoteCall:
    """Notes a layer's input and its positions, and makes its cache layer one that keeps compressed keys."""

    def __init__(self, system: NSA, layer: int) -> None:
        self.system, self.layer = system, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.system._calls[self.layer] = hidden_states, kwargs.get("position_ids")
        adopt_layer(kwargs.get("past_key_values"), self.layer, NSALayer)


class _ForgetCall:
    """Lets go of what `_NoteCall` noted."""

    def __init__(self, system: NSA, layer: int) -> None:
        self.system, self.layer = system, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.system._calls.pop(self.layer, None)


def load_branches(branches: Mapping[int, NSABranches], path: Path, config: NSAConfig) -> None:
    """Loads what `NSA.save` wrote.

    Raises:
        InputError: if the file is not such a file, or not for this model and config.
    """
    try:
        with safe_open(path, framework="pt") as file:
            written = json.loads((file.metadata() or {}).get("nsa", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"weights {path} cannot be read: {error}") from error
    if written != _sizes(config):
        raise InputError(f"weights {path} are for {written}; the config asks for {_sizes(config)}")
    expected = {f"{layer}.{name}": x for layer, branch in branches.items() for name, x in branch.state_dict().items()}
    wrong = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or expected[name].shape != tensors[name].shape
    )
    if wrong:
        raise InputError(f"weights {path} do not fit the model in {', '.join(wrong[:4])}")
    with torch.no_grad():
        for name, x in expected.items():
            x.copy_(tensors[name])


def _sizes(config: NSAConfig) -> dict[str, Any]:
    """What the shapes and the meaning of the parameters depend on."""
    values = dataclasses.asdict(config)
    return {name: values[name] for name in ("compression", "compression_block", "compression_stride")}
