"""The one place that knows the inside of diffusers' attention dispatcher.

A processor picks its kernel by its own ``_attention_backend``. The names are a closed Enum and there is no public way
to add one, so this module adds a member and registers the function behind it. Setting the member on (a copy of) the
processors of self-attention layers reroutes exactly those; LoRA, QKV fusion, norms and rotary embedding stay stock.

The dispatcher hands a processor's ``_parallel_config`` on to the backend. The copy's says which layer calls, as a
tensor, so that one compiled graph serves every layer of a kind.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any, Protocol

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.kernels.dense import DenseBackend, fastest_dense


def _add_backend_name(name: str) -> AttentionBackendName:
    existing = AttentionBackendName._value2member_map_.get(name)
    if isinstance(existing, AttentionBackendName):
        return existing
    member = str.__new__(AttentionBackendName, name)
    member._name_ = name.upper()
    member._value_ = name
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[name] = member
    return member


DRAFT_BACKEND = _add_backend_name("draftattn")


class AttentionOwner(Protocol):
    """What serves the self-attention of a transformer's layers."""

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """``[B, S, H, D]`` in and out."""
        ...


class LayerSlot:
    """Where the attention calls of one layer arrive.

    Args:
        owner: what serves them; the slot does not keep it alive.
        layer: number of the layer, which the owner is told.
        takes_mask: whether the model passes an attention mask, one that says nothing the owner does not know.
    """

    _numbers = itertools.count()

    def __init__(self, owner: AttentionOwner, layer: int, takes_mask: bool) -> None:
        self._owner = weakref.ref(owner)
        self._layer = layer
        self.takes_mask = takes_mask
        number = next(self._numbers)
        with torch.inference_mode(False):
            # an int would be a constant of the graph, which would then be compiled anew for every layer
            self.number = torch.tensor(number, device="cpu")
        _slots[number] = self

    def serve(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Serves a call of this layer."""
        owner = self._owner()
        assert owner is not None
        return owner.attention(self._layer, query, key, value, scale)


_slots: weakref.WeakValueDictionary[int, LayerSlot] = weakref.WeakValueDictionary()


@attention_dispatch._AttentionBackendRegistry.register(DRAFT_BACKEND)
def _serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    slot = _parallel_config
    if not isinstance(slot, LayerSlot):
        raise InputError("an attention processor did not hand on its _parallel_config, as those of diffusers do")
    if dropout_p or is_causal:
        raise InputError(f"dropout_p={dropout_p}, is_causal={is_causal}; draft attention supports neither")
    if attn_mask is not None and not slot.takes_mask:
        raise InputError("an attention mask is given to a self-attention that has none; draft attention would drop it")
    if not torch.compiler.is_compiling():
        return slot.serve(query, key, value, scale)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _serve_outside_the_graph(slot, query, key, value, scale)
    return _attention_of_slot(query, key, value, slot.number, scale)


@torch.compiler.disable
def _serve_outside_the_graph(slot: LayerSlot, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    return slot.serve(query, key, value, scale)


# Dense or sparse is decided when it runs: steps of both kinds share a graph. CUDA graphs end before it and begin anew
# after it, since which blocks are computed, and with which kernel, changes from call to call.
_TAGS: dict[str, Any] = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op(
    "draftattn::attention_of_slot",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor slot, float? scale) -> Tensor",
    **_TAGS,
)
def _attention_of_slot(query: Tensor, key: Tensor, value: Tensor, slot: Tensor, scale: float | None) -> Tensor:
    return _slots[int(slot)].serve(query, key, value, scale).contiguous()


@_attention_of_slot.register_fake
def _attention_of_slot_fake(query: Tensor, key: Tensor, value: Tensor, slot: Tensor, scale: float | None) -> Tensor:
    return query.new_empty(query.shape)


def check_processor(attention: nn.Module, name: str) -> None:
    """Checks that an attention module can be rerouted.

    Raises:
        InputError: if its processor does not go through the dispatcher, so that no backend can be set.
    """
    processor: Any = attention.processor
    if not hasattr(processor, "_attention_backend") or not hasattr(processor, "_parallel_config"):
        raise InputError(
            f"{name} has the processor {type(processor).__name__}, which does not use diffusers' attention "
            "dispatcher; reset it with set_attn_processor or set_default_attn_processor"
        )


class Reroute:
    """Points an attention module to draft attention until `undo`.

    The module gets a copy of its processor with another backend: modules may share one processor, cross-attention
    included, and the original stays untouched.

    Args:
        attention: the module.
        slot: where its calls shall arrive.
        adapter: may replace the copy (`VideoAdapter.reroute_processor`).
    """

    def __init__(self, attention: Any, slot: LayerSlot, adapter: Any) -> None:
        self._attention = weakref.ref(attention)
        self._original = attention.processor
        rerouted = copy.copy(self._original)
        rerouted._attention_backend, rerouted._parallel_config = DRAFT_BACKEND, slot
        self._copy = adapter.reroute_processor(rerouted)
        attention.processor = self._copy

    @property
    def backend(self) -> Any:
        """The backend the module had before."""
        return self._original._attention_backend

    @property
    def parallel_config(self) -> Any:
        """How diffusers spreads the module's attention over devices; None if it does not."""
        return self._original._parallel_config

    def undo(self) -> None:
        """Gives the module its own processor back, unless it was given another since."""
        attention = self._attention()
        if attention is not None and attention.processor is self._copy:
            attention.processor = self._original


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    backend: Any,
    kernel: DenseBackend = "auto",
) -> Tensor:
    """Attention on the backend a processor had before; where none was chosen, on the fastest dense kernel."""
    if backend is None and attn_mask is None and kernel != "torch" and _default_backend_is_active():
        return fastest_dense(query, key, value, scale, kernel)
    return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, scale=scale, backend=backend)


def _default_backend_is_active() -> bool:
    return attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
