"""Block-sparse attention on a CPU: torch's fused attention over gathered key blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from draftattn.kernels.api import BlockMeans
    from draftattn.kernels.block_mask import BlockMask

_CHUNK_BYTES = 4 * 2**20  # gathered keys and values that are alive at once


class _Blocks(NamedTuple):
    """Tokens by block, short blocks padded to the longest: token ids and which are real, ``[B | 1, N, L]``."""

    token: Tensor
    real: Tensor

    @classmethod
    def of(cls, offsets: Tensor) -> _Blocks:
        offsets = torch.atleast_2d(offsets).long()
        longest = max(1, int(offsets.diff(dim=-1).max()))
        token = offsets[:, :-1, None] + torch.arange(longest)
        return cls(token, token < offsets[:, 1:, None])

    def gather(self, x: Tensor) -> Tensor:
        """``[B, S, H, D]`` by block, ``[B, H, N, L, D]``, zeros in the padding."""
        batch, length, heads, head_dim = x.shape
        token = self.token.clamp(max=length - 1).flatten(1)
        if token.shape[0] == 1:
            tokens = x.transpose(1, 2).index_select(2, token[0])
        else:
            tokens = torch.stack([x[i].transpose(0, 1).index_select(1, token[i]) for i in range(batch)])
        blocks = tokens.view(batch, heads, *self.token.shape[1:], head_dim)
        return blocks if bool(self.real.all()) else blocks.masked_fill(~self.real[:, None, :, :, None], 0.0)

    def scatter(self, blocks: Tensor, length: int, outside: float) -> Tensor:
        """``[B, H, N, L, D]`` by token, ``[B, H, length, D]``, with one value for the tokens outside every block."""
        slot = torch.zeros(length, dtype=torch.long)
        inside = torch.zeros(length, dtype=torch.bool)
        token = self.token[self.real]
        slot[token] = self.real.flatten().nonzero()[:, 0]
        inside[token] = True
        tokens = blocks.flatten(2, 3)
        if tokens.shape[2] != length or not torch.equal(slot, torch.arange(length)):
            tokens = tokens.index_select(2, slot)
        return tokens if bool(inside.all()) else tokens.masked_fill(~inside[:, None], outside)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    causal: bool,
    residual: BlockMeans | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Batched dense attention over chunks of query blocks that have about as many key blocks. Differentiable.

    See ``draftattn.kernels.api.block_sparse_attention`` for the arguments.
    """
    batch, query_length, heads, head_dim = query.shape
    if min(query.numel(), key.numel(), block_mask.num_query_blocks, block_mask.num_key_blocks) == 0:
        no_lse = torch.full((batch, heads, query_length), -torch.inf) if return_lse else None
        return torch.zeros_like(query), no_lse
    if not return_lse and _is_dense(block_mask, query_length, key.shape[1], causal):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=heads != k.shape[1])
        return out.transpose(1, 2), None

    query_blocks, key_blocks = _Blocks.of(block_mask.query_offsets), _Blocks.of(block_mask.key_offsets)
    columns = _Columns(block_mask, query_blocks, key_blocks, query.shape, key.shape, causal, residual is not None)
    # [B · H · Q, rows, D]
    queries = query_blocks.gather(query).flatten(0, 2)
    keys = _with_means(key_blocks.gather(key), None if residual is None else residual.key)
    values = _with_means(key_blocks.gather(value), None if residual is None else residual.value)

    blocks_per_chunk = _CHUNK_BYTES // (2 * keys[0].numel() * keys.element_size())
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, values))
    gather = _Gather(keys, values, max(blocks_per_chunk, columns.most_blocks()), reuse=not differentiable)
    out = torch.zeros_like(queries)
    lse = torch.full(queries.shape[:2], -torch.inf)
    for unit in columns.chunks(blocks_per_chunk):
        ids = columns.ids(unit)
        bias, blind = columns.bias(unit, torch.promote_types(query.dtype, torch.float32))
        k, v = (x.view(len(unit), -1, head_dim) for x in gather(ids.flatten()))
        q = queries.index_select(0, unit)
        if return_lse:
            unit_out, unit_lse = _attend_with_lse(q, k, v, bias, scale)
            unit_lse = unit_lse if blind is None else unit_lse.masked_fill(blind, -torch.inf)
            lse.index_copy_(0, unit, unit_lse.float())
        else:
            unit_out = _attend(q, k, v, bias, scale)
        out.index_copy_(0, unit, unit_out if blind is None else unit_out.masked_fill(blind[..., None], 0.0))

    shape = (batch, heads, *query_blocks.token.shape[1:], -1)
    out = query_blocks.scatter(out.view(shape), query_length, outside=0.0).transpose(1, 2)
    if not return_lse:
        return out, None
    return out, query_blocks.scatter(lse.view(shape), query_length, outside=-torch.inf)[..., 0]


def _is_dense(block_mask: BlockMask, query_length: int, key_length: int, causal: bool) -> bool:
    # torch aligns a causal mask at the top left
    if causal and query_length != key_length:
        return False
    covered = all(
        bool((offsets[..., 0] == 0).all() and (offsets[..., -1] == length).all())
        for offsets, length in ((block_mask.query_offsets, query_length), (block_mask.key_offsets, key_length))
    )
    return covered and bool((block_mask.kv_num_blocks == block_mask.num_key_blocks).all())


class _Columns:
    """Which blocks of keys each *unit*, a query block of one head, attends to, and with what bias.

    With a residual, the mean keys fill a few blocks more behind the real ones, which every unit then takes.
    """

    def __init__(
        self,
        block_mask: BlockMask,
        query_blocks: _Blocks,
        key_blocks: _Blocks,
        query_shape: torch.Size,
        key_shape: torch.Size,
        causal: bool,
        residual: bool,
    ) -> None:
        shape = (query_shape[0], query_shape[2], block_mask.num_query_blocks)
        self.key_blocks, self.causal, self.residual = key_blocks, causal, residual
        self.num_key_blocks, longest = key_blocks.token.shape[1:]
        self.num_mean_blocks = -(-self.num_key_blocks // longest) if residual else 0
        self.key_ids = block_mask.kv_indices.expand(*shape, -1).flatten(0, 2).long()
        self.counts = block_mask.kv_num_blocks.expand(shape).flatten().long()

        item, head, block = (x.flatten() for x in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        kv_head = item * key_shape[2] + head // (shape[1] // key_shape[2])
        self.first_id = kv_head * (self.num_key_blocks + self.num_mean_blocks)
        self.item = item if key_blocks.token.shape[0] > 1 else torch.zeros_like(item)
        if causal:
            # bottom-right alignment: the last query sees every key
            self.visible = (query_blocks.token[0] + key_shape[1] - query_shape[1])[block]
            seen = key_blocks.token[self.item[:, None], self.key_ids, 0] <= self.visible[:, -1:]
            self.counts = (seen & (torch.arange(seen.shape[1]) < self.counts[:, None])).sum(-1)
        if residual:
            self.tokens_per_block = torch.atleast_2d(block_mask.key_offsets).diff(dim=-1)
            self.key_ends = torch.atleast_2d(block_mask.key_offsets)[:, 1:]
            self.skipped = ~block_mask.block_map.expand(*shape, -1).flatten(0, 2)

    def most_blocks(self) -> int:
        """The most blocks any unit attends to, blocks of means included."""
        return int(self.counts.max()) + self.num_mean_blocks

    def chunks(self, blocks_per_chunk: int) -> Iterator[Tensor]:
        """Units with something to attend to, in chunks of bounded size with nearly equal counts, most blocks first."""
        counts, order = self.counts.sort(descending=True, stable=True)
        sizes = (counts + self.num_mean_blocks).tolist()
        first = 0
        while first < len(order) and sizes[first] > 0:
            last = first + 1
            room = first + blocks_per_chunk // sizes[first]
            while last < min(len(order), room) and 8 * sizes[last] >= 7 * sizes[first]:
                last += 1
            yield order[first:last]
            first = last

    def ids(self, unit: Tensor) -> Tensor:
        """Rows of the blocked keys to gather, ``[units, blocks]``."""
        ids = self.key_ids[unit, : int(self.counts[unit].max())]
        if self.num_mean_blocks:
            means = self.num_key_blocks + torch.arange(self.num_mean_blocks)
            ids = torch.cat([ids, means.expand(len(unit), -1)], dim=1)
        return ids + self.first_id[unit, None]

    def bias(self, unit: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """What to add to a chunk's scores, ``[units, rows | 1, columns]``, and which rows see nothing at all.

        Both are None where every column counts as it is. The bias of rows that see nothing is 0, for a softmax over
        nothing is NaN.
        """
        item = self.item[unit, None]
        ids = self.key_ids[unit, : int(self.counts[unit].max())]
        used = torch.arange(ids.shape[1]) < self.counts[unit, None]
        # [units, 1, columns], real keys of chosen blocks
        allowed = (self.key_blocks.real[item, ids] & used[..., None]).flatten(1)[:, None]
        if not (self.causal or self.residual) and bool(allowed.all()):
            return None, None
        if self.causal:
            allowed = allowed & (self.key_blocks.token[item, ids].flatten(1)[:, None] <= self.visible[unit, :, None])
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
        if self.residual:
            skipped = self.skipped[unit, None]
            if self.causal:
                skipped = skipped & (self.key_ends[item] <= self.visible[unit, :, None] + 1)
            # the logarithm of 0 drops empty blocks
            mean_bias = torch.where(skipped, self.tokens_per_block[item].to(dtype).log(), -torch.inf)
            padding = self.num_mean_blocks * self.key_blocks.token.shape[2] - self.num_key_blocks
            bias = torch.cat([bias, F.pad(mean_bias, (0, padding), value=-torch.inf)], dim=-1)
        blind = (bias == -torch.inf).all(-1)
        if not bool(blind.any()):
            return bias, None
        return bias.masked_fill(blind[..., None], 0.0), blind


class _Gather:
    """Picks blocks of keys and values, into one buffer for all chunks: fresh memory costs more than the copy."""

    def __init__(self, keys: Tensor, values: Tensor, most: int, reuse: bool) -> None:
        self.sources = keys, values
        # what autograd saves must not be overwritten
        self.buffer = keys.new_empty(2, most, keys.shape[1]) if reuse else None

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.sources
        if self.buffer is None:
            return keys.index_select(0, ids), values.index_select(0, ids)
        key, value = self.buffer[:, : len(ids)]
        return torch.index_select(keys, 0, ids, out=key), torch.index_select(values, 0, ids, out=value)


def _with_means(blocks: Tensor, means: Tensor | None) -> Tensor:
    """``[B, H, N, L, D]`` with the means ``[B, N, H, D]`` in blocks behind, ``[B · H · blocks, L · D]``."""
    if means is not None:
        longest = blocks.shape[3]
        means = F.pad(means.transpose(1, 2), (0, 0, 0, -means.shape[1] % longest))
        blocks = torch.cat([blocks, means.unflatten(2, (-1, longest))], dim=2)
    return blocks.flatten(0, 2).flatten(1)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    mask = None if bias is None else bias[:, None]
    # torch runs its fused kernel for four dimensions only
    out = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], attn_mask=mask, scale=scale)
    return out[:, 0]


def _attend_with_lse(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    # torch's public function keeps the LSE of its fused kernel to itself
    dtype = torch.promote_types(query.dtype, torch.float32)
    bias = torch.zeros(1, 1, 1, dtype=dtype) if bias is None else bias
    scores = torch.baddbmm(bias, query.to(dtype), key.to(dtype).transpose(1, 2), alpha=scale)
    lse = scores.logsumexp(-1)
    return torch.bmm((scores - lse[..., None]).exp(), value.to(dtype)).to(query.dtype), lse
