"""Selective attention: tokens tell later ones what they need no longer look at."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from draftattn.errors import InputError

_CHUNK_SCORES = 2**25
_MOST_ROWS = 256  # of a chunk, so that pruned keys soon leave the products


class SelectiveState(NamedTuple):
    """What is known of the keys of a sequence, in the order of their tokens.

    Args:
        masked: float ``[B, K]``, how much the queries so far have masked each key.
        alive: bool ``[B, K]``: neither padding nor pruned.
        first: bool ``[B, K]``: the first token of each sequence, which is never masked and never pruned.
    """

    masked: Tensor
    alive: Tensor
    first: Tensor

    def take(self, index: Tensor) -> SelectiveState:
        """The state of the keys ``index``, ``[B, M]``."""
        return SelectiveState(*(x.gather(1, index) for x in self))


class SelectiveOutput(NamedTuple):
    """Attention, and what to keep for the queries to come.

    Args:
        output: ``[B, N, H, D]``; zeros for padding.
        kept: indices of the keys to keep, ascending, ``[B, M]``; None for all.
        state: of the kept keys.
    """

    output: Tensor
    kept: Tensor | None
    state: SelectiveState


def fresh_state(batch: int, length: int, device: torch.device, dtype: torch.dtype = torch.float32) -> SelectiveState:
    """The state of new sequences without padding."""
    first = torch.zeros(batch, length, dtype=torch.bool, device=device)
    first[:, :1] = True
    return SelectiveState(torch.zeros(batch, length, dtype=dtype, device=device), torch.ones_like(first), first)


def selective_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: SelectiveState | None = None,
    *,
    head: int = 0,
    budget: int | None = None,
    scale: float | None = None,
) -> SelectiveOutput:
    r"""Causal attention in which every token may mask others for all tokens after it. Differentiable.

    With the logits :math:`l^h_{ij}` of head :math:`h`, :math:`S_{ij} = \max(0, l^{head}_{ij})` for
    :math:`0 < j < i` and 0 otherwise, and :math:`F_{ij} = \sum_{k < i} S_{kj}`, the weights are the softmax of
    :math:`l^h_{ij} - F_{ij}` over :math:`j \le i`, for all heads. Source: Selective Attention, arXiv 2410.02703.

    With a budget the keys with the largest :math:`F` are pruned: before row ``i`` attends, keys leave until the row
    sees ``budget`` of them, its own included; of equally masked ones the older leaves. They never come back. The first
    token and the row's own are never pruned. One row at a time decides, so a budget costs a few small operations per
    query; the products are taken over what is left.

    Args:
        query: ``[B, N, H, D]``, after rotary embedding.
        key: ``[B, K, H_kv, D]``; the last N keys are the queries' own.
        value: ``[B, K, H_kv, D]``.
        state: of all K keys, nothing masked yet of the last N; None where ``K == N`` without padding.
        head: query head whose logits mask.
        budget: most keys that a query sees, at least 2; None for all.
        scale: factor of the logits, ``D ** -0.5`` if None.

    Raises:
        InputError: if head or budget is out of range, or there are cached keys without a state.

    >>> query, key, value = torch.randn(3, 1, 6, 2, 8).unbind()
    >>> whole = selective_attention(query, key, value)
    >>> part = selective_attention(query[:, :5], key[:, :5], value[:, :5])
    >>> state = SelectiveState(*(torch.cat(x, 1) for x in zip(part.state, fresh_state(1, 6, key.device).take(
    ...     torch.tensor([[5]])))))
    >>> last = selective_attention(query[:, 5:], key, value, state)
    >>> torch.allclose(last.output, whole.output[:, 5:], atol=1e-5)
    True
    """
    batch, num_queries, heads, head_dim = query.shape
    num_keys = key.shape[1]
    if not 0 <= head < heads:
        raise InputError(f"head is {head}; the layer has query heads 0 to {heads - 1}")
    if budget is not None and budget < 2:
        raise InputError(f"budget is {budget}; it must be at least 2, for the first token and the query's own")
    scale = head_dim**-0.5 if scale is None else float(scale)
    dtype = torch.promote_types(query.dtype, torch.float32)
    if state is None:
        if num_keys != num_queries:
            raise InputError(f"{num_keys} keys and {num_queries} queries need the state of the earlier keys")
        state = fresh_state(batch, num_keys, query.device, dtype)

    offset = num_keys - num_queries
    index = torch.arange(num_keys, device=query.device).expand(batch, -1)
    # columns of the keys still in play, and their state
    columns, known = index[:, :offset], SelectiveState(*(x[:, :offset] for x in state))
    if budget is not None:
        known = known._replace(alive=_trim(known, budget))
    outputs = []
    start = 0
    while start < num_queries:
        most = max(1, _CHUNK_SCORES // max(1, batch * heads * (columns.shape[1] + _MOST_ROWS)))
        rows = slice(start, min(num_queries, start + min(most, _MOST_ROWS)))
        own = slice(offset + rows.start, offset + rows.stop)
        columns = torch.cat([columns, index[:, own]], 1)
        known = SelectiveState(*(torch.cat([old, new[:, own]], 1) for old, new in zip(known, state, strict=True)))
        if budget is None:
            keys, values = key[:, : own.stop], value[:, : own.stop]
        else:
            keys, values = (_gather(x, columns) for x in (key, value))
        run = functools.partial(_attend_rows, head=head, budget=budget, scale=scale, dtype=dtype)
        if torch.is_grad_enabled() and rows.stop - rows.start < num_queries:
            # a chunk's weights are made again for its gradient: all at once they would be N×K
            output, masked, alive = checkpoint(run, query[:, rows], keys, values, *known, use_reentrant=False)
        else:
            output, masked, alive = run(query[:, rows], keys, values, *known)
        outputs.append(output)
        known = SelectiveState(masked, alive, known.first)
        if budget is not None and columns.shape[1] > budget:
            chosen = _alive_first(known.alive, budget)
            columns, known = columns.gather(1, chosen), known.take(chosen)
        start = rows.stop
    return SelectiveOutput(torch.cat(outputs, 1), None if budget is None else columns, known)


def _attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masked: Tensor,
    alive: Tensor,
    first: Tensor,
    *,
    head: int,
    budget: int | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows, whose own keys are the last columns: their output, and the columns' state after them."""
    rows, heads = query.shape[1:3]
    columns, kv_heads = key.shape[1:3]
    column = torch.arange(columns, device=query.device)
    own = column[columns - rows :, None]
    # [B, rows, columns], what each row masks: in full precision, for it adds up
    logits = torch.einsum("bnd,bkd->bnk", query[:, :, head].to(dtype), key[:, :, head * kv_heads // heads].to(dtype))
    # a row of padding masks nothing and sees nothing
    padding = ~alive[:, columns - rows :, None]
    maskable = (alive & ~first)[:, None] & (column < own) & ~padding
    selection = (logits * scale).relu().masked_fill(~maskable, 0.0)
    # a row is masked by those before it
    added = selection.cumsum(1)
    mask_of_row = masked[:, None] + (added - selection)
    seen = alive[:, None] & (column <= own)
    if budget is not None:
        seen, alive = _prune(mask_of_row.detach(), seen, alive, first, budget)
    queries = query.unflatten(2, (kv_heads, heads // kv_heads))
    scores = torch.einsum("bnhgd,bkhd->bhgnk", queries, key).to(dtype) * scale - mask_of_row[:, None, None]
    # a softmax over nothing is NaN, in the gradient too
    weights = scores.masked_fill((~seen & ~padding)[:, None, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill(padding[:, None, None], 0.0).to(value.dtype)
    output = torch.einsum("bhgnk,bkhd->bnhgd", weights, value).flatten(2, 3)
    return output, masked + added[:, -1], alive


@torch.no_grad()
def _prune(mask_of_row: Tensor, seen: Tensor, alive: Tensor, first: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """What each row sees, ``[B, rows, columns]``, and what is alive after the last one."""
    rows, columns = seen.shape[1:]
    seen, alive = seen.clone(), alive.clone()
    column = torch.arange(columns, device=seen.device)
    counts = seen.sum(-1)
    if bool((counts[:, -1] <= budget).all()):
        return seen, alive
    dropped = torch.zeros_like(alive)
    for row in range(rows):
        own = columns - rows + row
        in_reach = seen[:, row] & ~dropped
        excess = (in_reach.sum(-1) > budget)[:, None]
        choice = mask_of_row[:, row].masked_fill(~in_reach | first | (column == own), -torch.inf)
        # of equal ones the oldest, on every device
        worst = torch.where(choice == choice.amax(-1, keepdim=True), column, columns).amin(-1, keepdim=True)
        dropped |= (column == worst) & excess
        seen[:, row] = in_reach & ~((column == worst) & excess)
    return seen, alive & ~dropped


@torch.no_grad()
def _trim(state: SelectiveState, budget: int) -> Tensor:
    """What stays alive where more is than a budget allows, the first token and the least masked."""
    if state.alive.shape[1] <= budget:
        return state.alive
    order = state.masked.masked_fill(~state.alive, torch.inf).masked_fill(state.first & state.alive, -1.0)
    # of equal ones the younger stay
    rank = order.flip(1).argsort(dim=1, stable=True).argsort(1).flip(1)
    return state.alive & (rank < budget)


@torch.no_grad()
def _alive_first(alive: Tensor, count: int) -> Tensor:
    """Indices of the alive columns, ascending, ``[B, count]``; where there are fewer, dead ones among them."""
    chosen = (~alive).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return chosen.sort(1).values


def _gather(x: Tensor, columns: Tensor) -> Tensor:
    """``x[b, columns[b]]`` of ``[B, K, H, D]``."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], columns]
