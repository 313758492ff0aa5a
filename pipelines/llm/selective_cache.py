"""A cache for selective attention: it remembers what is masked, and forgets the most masked keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from draftattn.errors import InputError
from draftattn.pipelines.llm.cache_layers import check_model
from draftattn.pipelines.llm.selective_attention import SelectiveState, fresh_state

Budget = int | Sequence[int | None] | None


def budget_of_layer(budget: Budget, layer: int) -> int | None:
    """The budget of one layer, of one for all or one for each.

    >>> budget_of_layer([64, 128], 1), budget_of_layer(64, 5)
    (128, 64)
    """
    if budget is None or isinstance(budget, int):
        return budget
    if layer >= len(budget):
        raise InputError(f"budget has {len(budget)} numbers; layer {layer} has none")
    return budget[layer]


class SelectiveLayer(DynamicLayer):
    """The keys and values of one layer, with how much each key is masked.

    Args:
        budget: most keys that are kept; None keeps all.
    """

    is_croppable = False

    def __init__(self, budget: int | None = None) -> None:
        super().__init__()
        self.budget = budget
        self.seen = 0
        self.state: SelectiveState | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends new tokens, ``[B, H_kv, N, D]``; returns what is kept and them."""
        held = 0 if self.state is None else self.state.masked.shape[1]
        if self.keys is not None and self.is_initialized and self.keys.shape[2] != held:
            raise InputError('a selective cache needs selective attention; apply(model, "selective") first')
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states, *args, **kwargs)

    def extended_state(self, real: Tensor, first: Tensor) -> SelectiveState:
        """The state with that of the new tokens: which are no padding and which begin a sequence, ``[B, N]`` each."""
        new = fresh_state(real.shape[0], real.shape[1], real.device)._replace(alive=real, first=first)
        if self.state is None:
            return new
        return SelectiveState(*(torch.cat([old, x.to(old.dtype)], 1) for old, x in zip(self.state, new, strict=True)))

    def keep(self, kept: Tensor | None, state: SelectiveState) -> None:
        """Keeps some of the tokens, ``[B, M]``, or all, with their state."""
        assert self.keys is not None
        assert self.values is not None
        if kept is not None and kept.shape[1] < self.keys.shape[2]:
            item = torch.arange(len(kept), device=kept.device)[:, None]
            # [B, M, H_kv, D], for indices with a slice between them come first
            self.keys, self.values = (x[item, :, kept].transpose(1, 2) for x in (self.keys, self.values))
        self.state = SelectiveState(*(x.detach() for x in state))

    def get_seq_length(self) -> int:
        """Tokens that have come, pruned ones included: the position of the next."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that transformers makes."""
        return self.seen + query_length, 0

    def _select(self, index: Tensor) -> None:
        if self.state is not None:
            self.state = SelectiveState(*(x.index_select(0, index.to(x.device)) for x in self.state))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes other items, for beam search."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
            self.values = self.values.index_select(0, beam_idx.to(self.values.device))
            self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every item."""
        if self.state is not None:
            self.reorder_cache(torch.arange(len(self.state.masked)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some items."""
        if self.state is not None:
            self.reorder_cache(torch.arange(len(self.state.masked), device=indices.device)[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: what removed tokens have masked and pruned cannot be undone."""
        if tokens_to_remove:
            raise InputError("a selective cache cannot give tokens back, as assisted generation asks for")

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.seen, self.state = 0, None


class SelectiveCache(Cache):
    """A cache for `generate` on a model with selective attention, with a memory budget.

    Args:
        model: the model that the cache is for.
        budget: most keys that each layer keeps, one number or one per layer; None for all.

    Raises:
        InputError: if there is no model, a budget is below 2 or there is not one for each layer.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from draftattn.pipelines.llm import apply
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2))
    >>> handle = apply(model, "selective")
    >>> cache = SelectiveCache(model, budget=8)
    >>> text = model.generate(torch.arange(2, 22)[None], past_key_values=cache, max_new_tokens=4, do_sample=False)
    >>> cache.get_seq_length(), cache.layers[0].keys.shape[2]
    (23, 8)
    """

    def __init__(self, model: PreTrainedModel, budget: Budget = None) -> None:
        check_model(model)
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        budgets = [budget_of_layer(budget, layer) for layer in range(count)]
        for each in budgets:
            check_budget(each)
        super().__init__(layers=[SelectiveLayer(each) for each in budgets])


def check_budget(budget: int | None) -> None:
    """Raises an InputError for a budget that is none."""
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 2):
        raise InputError(
            f"budget is {budget!r}; it must be None or at least 2, for the first token and the query's own"
        )
