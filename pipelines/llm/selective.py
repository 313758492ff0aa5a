"""Selective attention in a language model of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from draftattn.errors import InputError
from draftattn.pipelines.llm.attention import dense_in_groups
from draftattn.pipelines.llm.cache_layers import adopt_layer
from draftattn.pipelines.llm.density import causal_pairs
from draftattn.pipelines.llm.ranges import TokenRanges
from draftattn.pipelines.llm.selective_attention import fresh_state, selective_attention
from draftattn.pipelines.llm.selective_cache import SelectiveCache, SelectiveLayer, budget_of_layer, check_budget
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem, SystemConfig

__all__ = ["SelectiveAttention", "SelectiveCache", "SelectiveConfig"]


@dataclass(frozen=True)
class SelectiveConfig(SystemConfig):
    """Selective attention (arXiv 2410.02703), which has no parameters: one head's logits mask keys for all others.

    A model must be trained with it, from scratch or further. The memory of its cache can then be cut with little loss.

    Args:
        head: query head whose logits mask.
        budget: most keys that a query sees and a cache keeps: one number, one per layer, or None for all. A
            `SelectiveCache` given to ``generate`` brings its own.
        dense_layers: see `SystemConfig`; ``dense_len`` must be 0, for the first tokens mask already.
    """

    head: int = 0
    budget: int | tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense_len:
            raise InputError(f"dense_len is {self.dense_len}; selective attention allows only 0")
        if self.head < 0:
            raise InputError(f"head is {self.head}; it must not be negative")
        if self.budget is not None and not isinstance(self.budget, int):
            object.__setattr__(self, "budget", tuple(self.budget))
        for budget in self.budget if isinstance(self.budget, tuple) else (self.budget,):
            check_budget(budget)


class SelectiveAttention(AttentionSystem):
    """Selective attention in every layer; plain caches of `generate` become ones that remember what is masked."""

    name = "selective"
    config_class = SelectiveConfig
    sparse_decode = True

    def __init__(self, config: SelectiveConfig) -> None:
        super().__init__(config)
        self._hooks: list[Any] = []

    def attach(self, model: nn.Module, layers: dict[int, nn.Module]) -> None:
        """Makes sure that there is a budget for every layer and a head to mask, then watches the caches."""
        for layer, module in layers.items():
            budget_of_layer(self.config.budget, layer)
            heads = getattr(getattr(module, "config", None), "num_attention_heads", self.config.head + 1)
            if self.config.head >= heads:
                raise InputError(f"head is {self.config.head}; the layers have query heads 0 to {heads - 1}")
        for layer, module in layers.items():
            self._hooks.append(module.register_forward_pre_hook(_AdoptCache(self, layer), with_kwargs=True))

    def detach(self) -> None:
        """Stops watching."""
        while self._hooks:
            self._hooks.pop().remove()

    def attend(self, call: AttentionCall) -> Tensor:
        """One call over whole sequences; `forward` is what serves a model."""
        budget = budget_of_layer(self.config.budget, call.layer)
        options: dict[str, Any] = dict(head=self.config.head, budget=budget, scale=call.scale)
        return selective_attention(call.query, call.key, call.value, **options).output

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: TokenRanges | Tensor | None,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Serves a padded batch as one: a padded token is never seen and masks nothing."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if not isinstance(mask, TokenRanges):
            raise InputError("selective attention needs causal attention with a 2-D attention_mask or none")
        if mask.window is not None and mask.num_keys > mask.window:
            return dense_in_groups(module, query, key, value, mask, scale, sliding_window)
        if mask.gaps is not None:
            raise InputError(
                f"attention_mask of item {mask.gaps} has gaps; allowed is padding on the left or on the right"
            )
        cached = self._cached(layer, mask)
        real, first = _new_tokens(mask, query.shape[0], query.device)
        if cached is None:
            key, value = (x[:, :, : mask.num_keys] for x in (key, value))
            state = fresh_state(real.shape[0], real.shape[1], real.device)._replace(alive=real, first=first)
            budget = budget_of_layer(self.config.budget, layer)
        else:
            state, budget = cached.extended_state(real, first), cached.budget
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        result = selective_attention(query, key, value, state, head=self.config.head, budget=budget, scale=scale)
        if cached is not None:
            cached.keep(result.kept, result.state)
        if self.recorder is not None:
            pairs = _pairs(mask.query_offset, mask.num_queries, budget) * len(query)
            self.recorder.add(layer, float(pairs), mask.num_queries, mask.num_keys, len(query))
        return result.output

    def _cached(self, layer: int, mask: TokenRanges) -> SelectiveLayer | None:
        cache = self.caches.get(layer, lambda: None)()
        found = cache.layers[layer] if isinstance(cache, Cache) and layer < len(cache.layers) else None
        if isinstance(found, SelectiveLayer):
            return found
        if mask.query_offset:
            kind = "no cache" if found is None else f"a {type(found).__name__}"
            raise InputError(
                f"layer {layer} has earlier keys in {kind}, which does not know what they are masked by; allowed are a "
                "new DynamicCache, or a SelectiveCache"
            )
        return None


class _AdoptCache:
    """Turns the layer of a plain growing cache that is still empty into one that remembers what is masked."""

    def __init__(self, system: SelectiveAttention, layer: int) -> None:
        self.system, self.layer = system, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        budget = budget_of_layer(self.system.config.budget, self.layer)
        adopt_layer(kwargs.get("past_key_values"), self.layer, SelectiveLayer, budget)


def _new_tokens(mask: TokenRanges, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the call's tokens are real, and which begin a sequence: bool ``[B, N]`` each."""
    position = torch.arange(mask.query_offset, mask.num_keys, device=device)
    if mask.ranges is None or mask.padding is None:
        return torch.ones(batch, len(position), dtype=torch.bool, device=device), (position == 0).expand(batch, -1)
    first = torch.tensor([start for start, _ in mask.ranges], device=device)[:, None]
    real = mask.padding[:, mask.query_offset :].to(device)
    return real, (position == first) & real


def _pairs(offset: int, num_queries: int, budget: int | None) -> int:
    """Pairs of a query and a key it sees, where a query sees at most ``budget`` keys.

    >>> _pairs(0, 4, None), _pairs(0, 4, 2), _pairs(3, 2, 2)
    (10, 7, 4)
    """
    everything = causal_pairs(num_queries, offset + num_queries)
    if budget is None:
        return everything
    # those beyond the budget form a triangle, or what the first query leaves of it
    beyond, before = max(0, offset + num_queries - budget), max(0, offset - budget)
    return everything - beyond * (beyond + 1) // 2 + before * (before + 1) // 2
