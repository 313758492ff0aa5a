"""The attention function and the mask function that transformers calls, both under one name."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from draftattn.errors import InputError
from draftattn.pipelines.llm.dense import dense_attention, single_query_attention
from draftattn.pipelines.llm.ranges import TokenRanges
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem

NAME = "draftattn"

# which system serves an attention module, and a configuration's models; a copy of a model is in neither and stays dense
_system_of_module: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AttentionSystem]] = weakref.WeakKeyDictionary()
_system_of_config: dict[int, tuple[weakref.ref[Any], weakref.ref[AttentionSystem]]] = {}


def register() -> None:
    """Makes the name known to transformers. An unregistered mask function would let padding be ignored silently."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


def serve(config: Any, modules: list[nn.Module], system: AttentionSystem) -> None:
    """Puts a system in charge of attention modules and their model's configuration."""
    for module in modules:
        _system_of_module[module] = weakref.ref(system)
    # configurations cannot be hashed
    _system_of_config[id(config)] = weakref.ref(config), weakref.ref(system)


def release(config: Any, modules: list[nn.Module]) -> None:
    """Undoes `serve`."""
    for module in modules:
        _system_of_module.pop(module, None)
    _system_of_config.pop(id(config), None)


def system_of(module: nn.Module) -> AttentionSystem | None:
    """The system that serves an attention module."""
    found = _system_of_module.get(module)
    return None if found is None else found()


@torch.compiler.disable  # host ranges and weak mappings; compiled models break their graph here, and go on
def mask_function(**request: Any) -> Any:
    """transformers' mask function: what every layer gets as ``attention_mask``."""
    config = request.get("config")
    of_config, of_system = _system_of_config.get(id(config), (None, None))
    system = of_system() if of_config and of_system and of_config() is config else None
    return token_ranges(**request) if system is None else system.mask(request)


def token_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | TokenRanges | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **others: Any,
) -> TokenRanges | Tensor | None:
    """`TokenRanges` of a causal call, or torch's boolean mask ``[B, 1, N, K]`` for anything that is more than that.

    The arguments are those of transformers' mask functions.
    """
    if isinstance(attention_mask, TokenRanges):
        return attention_mask
    plain = mask_function is causal_mask_function
    # a sliding window's rule is a closure; transformers forbids the causal shortcut where it adds others to it
    plain = plain or (local_size is not None and not use_vmap and (allow_is_causal_skip or q_length == 1))
    if plain and kv_offset == 0:
        num_keys = int(q_offset) + q_length  # a static cache holds more, which nothing sees yet
        return TokenRanges.of(batch_size, q_length, num_keys, attention_mask, local_size)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=int(q_offset),
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        **others,
    )


@torch.compiler.disable
def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenRanges | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``[B, H, N, D]`` inputs, output ``[B, N, H, D]``."""
    device = query.device.type
    if torch.is_autocast_enabled(device):  # what autocast does before torch's own attention: rotary gave float32
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        with torch.autocast(device, enabled=False):
            return attention_function(
                module, query, key, value, attention_mask, dropout, scaling, sliding_window, **others
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    system = system_of(module)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if unknown:
        raise InputError(f"attention with {', '.join(unknown)} cannot be served; only plain softmax attention can")
    packed = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k") if others.get(name) is not None]
    if packed:
        raise InputError(
            f"packed sequences ({', '.join(packed)}) cannot be served; give the texts as a padded batch with its "
            "attention_mask"
        )
    if dropout:
        raise InputError(f"attention dropout is {dropout}; block-sparse attention has none, so it must be 0")
    if system is None:
        return dense_in_groups(module, query, key, value, attention_mask, scale, sliding_window), None
    return system.forward(module, query, key, value, attention_mask, scale, sliding_window), None


def dense_in_groups(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TokenRanges | Tensor | None,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Dense attention under whatever mask; layouts as in `attention_function`."""
    return attend_in_groups(None, module, query, key, value, mask, scale, sliding_window)


def attend_in_groups(
    system: AttentionSystem | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TokenRanges | Tensor | None,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Serves the items of a batch that have the same real tokens together, without their padding.

    So a padded item gets what it would get alone, bit for bit where the kernels promise it. Outputs of padding are 0.
    A layer with a sliding window that hides something is computed with that window and not by the system.
    """
    if not isinstance(mask, TokenRanges):
        return _under_a_mask(system, module, query, key, value, mask, scale, sliding_window)
    if mask.num_queries == 1 and mask.padding is not None and (mask.gaps is not None or not _decodes(system)):
        # one query per item: a mask of one row costs nothing, and the whole batch is one call
        padding = _windowed(mask.padding, mask.window)[:, None, None]
        key, value = (x[:, :, : mask.num_keys] for x in (key, value))
        return single_query_attention(query, key, value, scale, padding)
    if mask.gaps is not None:
        raise InputError(
            f"attention_mask of item {mask.gaps} has gaps; allowed is padding on the left or on the right (for "
            "generation pad on the left)"
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    groups = mask.groups()
    if len(groups) == 1 and groups[0] == (None, 0, mask.num_keys):
        return _attend(system, module, query, key[:, : mask.num_keys], value[:, : mask.num_keys], scale, mask)
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    for items, first, end in groups:
        first_query = max(first - mask.query_offset, 0)
        rows = slice(first_query, end - mask.query_offset)
        if rows.stop <= rows.start:
            continue
        index: Any = slice(None)
        if items is not None:
            # neighbours are a view, others a copy of all their keys
            neighbours = items[-1] - items[0] + 1 == len(items)
            index = slice(items[0], items[-1] + 1) if neighbours else list(items)
        served = _attend(
            system, module, query[index, rows], key[index, first:end], value[index, first:end], scale, mask, items,
            first_query,
        )  # fmt: skip
        output = _put(output, index, rows, served)
    return output


def _put(output: Tensor, index: Any, rows: slice, part: Tensor) -> Tensor:
    output[index, rows] = part
    return output


def _decodes(system: AttentionSystem | None) -> bool:
    return system is not None and system.sparse_decode


def _attend(
    system: AttentionSystem | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: TokenRanges,
    items: tuple[int, ...] | None = None,
    first_query: int = 0,
) -> Tensor:
    """One unpadded call, sparse or dense; ``[B, N, H, D]``."""
    hidden_by_window = mask.window is not None and key.shape[1] > mask.window
    if system is None or hidden_by_window:
        return dense_attention(query, key, value, scale, mask.window)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    cache = system.caches.get(layer, lambda: None)()
    call = AttentionCall(query, key, value, scale, layer, module, items, first_query, cache, system.recorder)
    if system.serves(call):
        return system.attend(call)
    if system.recorder is not None:
        system.recorder.record_dense(layer, call.num_queries, call.num_keys, query.shape[0])
    return dense_attention(query, key, value, scale)


def _windowed(padding: Tensor, window: int | None) -> Tensor:
    """Real keys that a single query at the end sees."""
    if window is None or padding.shape[1] <= window:
        return padding
    return padding & (torch.arange(padding.shape[1], device=padding.device) >= padding.shape[1] - window)


def _under_a_mask(
    system: AttentionSystem | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    if system is not None and sliding_window is None:
        what = "no mask at all" if mask is None else f"a mask {list(mask.shape)}"
        raise InputError(
            f"{system.name} got {what}; allowed are causal attention with a 2-D attention_mask or none, without packed "
            "sequences"
        )
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scale)[0]
