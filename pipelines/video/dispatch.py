"""The one place that knows the inside of diffusers' attention dispatcher.

A processor picks its kernel by its own ``_attention_backend``. The names are a closed Enum and there is no public way
to add one, so this module adds a member and registers the function behind it. Setting the member on (a copy of) the
processors of self-attention layers reroutes exactly those; LoRA, QKV fusion, norms and rotary embedding stay stock.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn

from draftattn.errors import InputError

# Serves one attention call: (query, key, value, attn_mask, scale) in [B, S, H, D]; None asks for dense attention.
AttentionCall = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]

_current_call: ContextVar[AttentionCall | None] = ContextVar("draftattn_current_call", default=None)


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
    call = _current_call.get()
    if call is None:
        raise RuntimeError("the draftattn attention backend was reached outside an enabled transformer's forward")
    if _parallel_config is not None:
        raise InputError("context parallelism is on; draft attention runs on one device per transformer so far")
    if dropout_p or is_causal:
        raise InputError(f"dropout_p={dropout_p}, is_causal={is_causal}; draft attention supports neither")
    return call(query, key, value, attn_mask, scale)


def set_current_call(call: AttentionCall) -> None:
    """Names what serves the next attention call; each self-attention module does so just before it runs."""
    _current_call.set(call)


def check_processor(attention: nn.Module, name: str) -> None:
    """Checks that an attention module can be rerouted.

    Raises:
        InputError: if its processor does not go through the dispatcher, so that no backend can be set.
    """
    processor: Any = attention.processor
    if not hasattr(processor, "_attention_backend"):
        raise InputError(
            f"{name} has the processor {type(processor).__name__}, which does not use diffusers' attention "
            "dispatcher; reset it with set_attn_processor or set_default_attn_processor"
        )


class Reroute:
    """Points an attention module to draft attention until `undo`.

    The module gets a copy of its processor with another backend: modules may share one processor, cross-attention
    included, and the original stays untouched.
    """

    def __init__(self, attention: Any) -> None:
        self._attention = weakref.ref(attention)
        self._original = attention.processor
        self._copy = copy.copy(self._original)
        self._copy._attention_backend = DRAFT_BACKEND
        attention.processor = self._copy

    @property
    def backend(self) -> Any:
        """The backend the module had before."""
        return self._original._attention_backend

    def undo(self) -> None:
        """Gives the module its own processor back, unless it was given another since."""
        attention = self._attention()
        if attention is not None and attention.processor is self._copy:
            attention.processor = self._original


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None, backend: Any
) -> Tensor:
    """Attention on the backend a processor had before."""
    return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, scale=scale, backend=backend)
