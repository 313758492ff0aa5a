"""The gate before a system is timed: its output may err at most twice as much as torch's own attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draftattn.kernels import reference
from draftattn.kernels.api import BlockMeans
from draftattn.pipelines.llm.moba import Moba, moba_choice
from draftattn.pipelines.llm.prefill import PrefillSystem
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem

MOST_ROWS = 1024  # queries of MoBA that are checked


def check_system(system: AttentionSystem, call: AttentionCall) -> dict[str, Any] | None:
    """Compares a call with float64 attention over the same pairs of tokens; None where a system cannot tell them.

    Args:
        system: what will be timed.
        call: a small problem in the dtype to be timed.

    Returns:
        ``error`` and ``allowed`` (relative, Frobenius), and ``green``.
    """
    mask = system.mask_of(call)
    rows = torch.arange(call.num_queries, device=call.query.device)
    if isinstance(system, Moba) and len(rows) > MOST_ROWS:
        # so many tokens that chunks are left out have too many pairs for float64
        rows = torch.linspace(0, len(rows) - 1, MOST_ROWS, device=rows.device).round().long()
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    if mask is not None:
        residual = system.residual_of(call, mask) if isinstance(system, PrefillSystem) else None
        means = None if residual is None else BlockMeans(*(x.double() for x in residual))
        exact, _ = reference.attention_forward(
            query, key, value, mask, scale=call.scale, causal=True, residual=means, return_lse=False
        )
    elif isinstance(system, Moba):
        exact = _masked(query[:, rows], key, value, _moba_pairs(system, call, rows), call.scale)
    else:
        return None
    ours = system.attend(call)[:, rows]
    causal = _causal(call, rows)
    q, k, v = (x.transpose(1, 2) for x in (call.query[:, rows], call.key, call.value))
    torchs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=causal, scale=call.scale, enable_gqa=True
    ).transpose(1, 2)
    dense = _masked(query[:, rows], key, value, causal[None, None], call.scale)
    error, allowed = float((ours - exact).norm() / exact.norm()), 2 * float((torchs - dense).norm() / dense.norm())
    # fp32 kernels may add in another order than torch
    allowed = max(allowed, 1e-6)
    return {"error": error, "allowed": allowed, "green": error <= allowed}


def small_call(system: AttentionSystem, call: AttentionCall, tokens: int) -> AttentionCall:
    """The first tokens of a call, and of its heads those that share the first key head.

    Args:
        system: what will be checked; MoBA gets as many tokens as it needs to leave chunks out, where the call has them.
        call: the whole call.
        tokens: how many for the others.
    """
    if isinstance(system, Moba):
        tokens = max(tokens, (system.config.top_k + 2) * system.config.chunk_size)
    tokens, group = min(tokens, call.num_queries), call.query.shape[2] // call.key.shape[2]
    query, key, value = call.query[:, :tokens, :group], call.key[:, :tokens, :1], call.value[:, :tokens, :1]
    return replace(call, query=query, key=key, value=value)


def _causal(call: AttentionCall, rows: Tensor) -> Tensor:
    """Which keys some of the queries see, bool ``[rows, K]``."""
    return torch.arange(call.num_keys, device=rows.device) <= (rows + call.query_offset)[:, None]


def _moba_pairs(system: Moba, call: AttentionCall, rows: Tensor) -> Tensor:
    """Which keys some of MoBA's queries see, bool ``[B, H, rows, K]``."""
    config = system.config
    num_keys, kv_heads = call.key.shape[1:3]
    position = rows + call.query_offset
    chunk_of_key = torch.arange(num_keys, device=call.query.device) // config.chunk_size
    num_chunks = -(-num_keys // config.chunk_size)
    own = (position // config.chunk_size)[:, None]
    maps = []
    for item in range(call.query.shape[0]):
        for kv_head, query in enumerate(call.query[item, rows].unflatten(1, (kv_heads, -1)).unbind(1)):
            chosen = torch.arange(num_chunks, device=call.query.device) == own[:, None]
            chosen = chosen.expand(-1, query.shape[1], -1).clone()
            if num_chunks > config.top_k > 1:
                choice = moba_choice(
                    query, call.key[item, :, kv_head], position,
                    chunk_size=config.chunk_size, top_k=config.top_k, force_first=config.force_first,
                )  # fmt: skip
                chosen.scatter_(-1, choice, True)
            chosen |= (own < config.top_k)[:, None]
            maps.append(chosen.transpose(0, 1)[..., chunk_of_key])
    return torch.cat(maps).unflatten(0, (call.query.shape[0], -1)) & _causal(call, rows)


def _masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax attention over the pairs that are seen, a key head at a time."""
    outputs = []
    group = query.shape[2] // key.shape[2]
    for kv_head in range(key.shape[2]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        scores = torch.einsum("bqgd,bkd->bgqk", query[:, :, heads], key[:, :, kv_head]) * scale
        of_heads = seen if seen.shape[1] == 1 else seen[:, heads]
        shares = scores.masked_fill(~of_heads, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("bgqk,bkd->bqgd", shares, value[:, :, kv_head]))
    return torch.cat(outputs, dim=2)
