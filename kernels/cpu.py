"""Block-sparse attention on a CPU: torch's fused attention over gathered key blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from draftattn.kernels.api import BlockMeans
    from draftattn.kernels.block_mask import BlockMask

_CHUNK_BYTES = 8 * 2**20  # gathered keys and values that are alive at once


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

    def gather(self, x: Tensor, item: int) -> Tensor:
        """``[S, D]`` of one batch item by block, ``[N, L, D]``, zeros in the padding."""
        item = min(item, self.token.shape[0] - 1)
        blocks = x.index_select(0, self.token[item].clamp(max=len(x) - 1).flatten()).unflatten(0, self.token.shape[1:])
        return blocks if bool(self.real[item].all()) else blocks.masked_fill(~self.real[item, ..., None], 0.0)

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
        no_lse = torch.full((batch, heads, query_length), -torch.inf, dtype=torch.float32) if return_lse else None
        return torch.zeros_like(query), no_lse
    if not return_lse and _is_dense(block_mask, query_length, key.shape[1], causal):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=heads != k.shape[1])
        return out.transpose(1, 2), None

    query_blocks, key_blocks = _Blocks.of(block_mask.query_offsets), _Blocks.of(block_mask.key_offsets)
    columns = _Columns(block_mask, query_blocks, key_blocks, query.shape, key.shape[1], causal, residual is not None)
    # [B, H, Q, L, D], and one dimension less
    out = query.new_zeros(batch, heads, *query_blocks.token.shape[1:], head_dim)
    lse = torch.full(out.shape[:-1], -torch.inf, dtype=torch.float32)
    blocks_per_chunk = _CHUNK_BYTES // (2 * key_blocks.token.shape[2] * head_dim * key.element_size())
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, *(residual or ())))
    gather = _Gather(max(blocks_per_chunk, columns.most_blocks()), reuse=not differentiable)
    group = heads // key.shape[2]
    # heads that share keys and pattern are rows of one product
    together = min(group, columns.heads_per_mask)

    # a key head at a time, so that its keys and values stay in cache
    for item, kv_head in itertools.product(range(batch), range(key.shape[2])):
        keys, values = (key_blocks.gather(x[item, :, kv_head], item) for x in (key, value))
        if residual is not None:
            keys, values = (
                _with_means(x, means[item, :, kv_head]) for x, means in zip((keys, values), residual, strict=True)
            )
        for head in range(kv_head * group, kv_head * group + group, together):
            queries = query_blocks.gather(query[item, :, head : head + together].flatten(1), 0)
            # [Q, heads, L, D] from [Q, L, heads * D]
            queries = queries.unflatten(-1, (together, head_dim)).transpose(1, 2)
            out_of_heads, lse_of_heads = (x[item, head : head + together] for x in (out, lse))
            for block in columns.chunks(item, head, blocks_per_chunk):
                bias, blind = columns.bias(item, head, block, torch.promote_types(query.dtype, torch.float32))
                if together > 1 and bias is not None and bias.shape[1] > 1:
                    bias = bias.repeat(1, together, 1)
                    blind = None if blind is None else blind.repeat(1, together)
                ids = columns.ids(item, head, block).flatten()
                k, v = (x.view(len(block), -1, head_dim) for x in gather(keys, values, ids))
                k, v = (x[:, : x.shape[1] - columns.mean_padding] for x in (k, v))
                q = queries.index_select(0, block).flatten(1, 2)
                if return_lse:
                    block_out, block_lse = _attend_with_lse(q, k, v, bias, scale)
                    block_lse = block_lse if blind is None else block_lse.masked_fill(blind, -torch.inf)
                    block_lse = block_lse.float().unflatten(1, (together, -1)).transpose(0, 1)
                    lse_of_heads.index_copy_(1, block, block_lse)
                else:
                    block_out = _attend(q, k, v, bias, scale)
                block_out = block_out if blind is None else block_out.masked_fill(blind[..., None], 0.0)
                out_of_heads.index_copy_(1, block, block_out.unflatten(1, (together, -1)).transpose(0, 1))

    out = query_blocks.scatter(out, query_length, outside=0.0).transpose(1, 2)
    if not return_lse:
        return out, None
    return out, query_blocks.scatter(lse[..., None], query_length, outside=-torch.inf)[..., 0]


def _is_dense(block_mask: BlockMask, query_length: int, key_length: int, causal: bool) -> bool:
    # torch aligns a causal mask at the top left
    if causal and (query_length != key_length or block_mask.query_shifts is not None):
        return False
    if block_mask.window is not None:
        return False
    covered = all(
        bool((offsets[..., 0] == 0).all() and (offsets[..., -1] == length).all())
        for offsets, length in ((block_mask.query_offsets, query_length), (block_mask.key_offsets, key_length))
    )
    return covered and bool((block_mask.kv_num_blocks == block_mask.num_key_blocks).all())


class _Columns:
    """Which blocks of keys a query block of one head attends to, and with what bias.

    With a residual, the mean keys fill a few blocks more behind the real ones, which every query block then takes.
    """

    def __init__(
        self,
        block_mask: BlockMask,
        query_blocks: _Blocks,
        key_blocks: _Blocks,
        query_shape: torch.Size,
        key_length: int,
        causal: bool,
        residual: bool,
    ) -> None:
        batch, query_length, heads, _ = query_shape
        self.key_blocks, self.causal, self.residual, self.window = key_blocks, causal, residual, block_mask.window
        self.whole: Tensor | None = None
        self.num_key_blocks, longest = key_blocks.token.shape[1:]
        self.num_mean_blocks = -(-self.num_key_blocks // longest) if residual else 0
        # columns at the end that hold nothing
        self.mean_padding = self.num_mean_blocks * longest - self.num_key_blocks if residual else 0
        self.heads_per_mask = heads // block_mask.kv_num_blocks.shape[1]
        self.key_ids = block_mask.kv_indices.expand(batch, -1, -1, -1)
        self.counts = block_mask.kv_num_blocks.expand(batch, -1, -1)
        # [B | 1, Q, L], where queries stand among the keys
        shifts = block_mask.query_shifts
        self.position = query_blocks.token + (
            key_length - query_length if shifts is None else torch.atleast_2d(shifts)[..., None]
        )
        starts = key_blocks.token[:, None, None, :, 0]
        if causal:
            seen = self._of_ids(starts) <= self.position[:, None, :, -1:]
            self.counts = (seen & self._used()).sum(-1)
        if self.window is not None:
            ends = torch.atleast_2d(block_mask.key_offsets)[:, None, None, 1:]
            first = block_mask.key_offsets[..., :1] if self.window.starts is None else self.window.starts
            # [B | 1, Q], where the sinks of a query block's sequence end
            self.sink_end = torch.atleast_2d(first).expand(-1, query_blocks.token.shape[1]) + self.window.sink
            behind = self._of_ids(ends) <= self.position[:, None, :, :1] - self.window.size + 1
            hidden = behind & (self._of_ids(starts) >= self.sink_end[:, None, :, None])
            if self.window.whole is not None:
                self.whole = self.window.whole.expand(batch, -1, -1, -1)
                hidden &= ~self.whole
            self._keep(self._used() & ~hidden)
        if residual:
            offsets = torch.atleast_2d(block_mask.key_offsets).expand(batch, -1)
            self.log_counts, self.key_ends = offsets.diff(dim=-1).double().log(), offsets[:, 1:]
            self.skipped = ~block_mask.block_map.expand(batch, -1, -1, -1)

    def _used(self) -> Tensor:
        return torch.arange(self.key_ids.shape[-1]) < self.counts[..., None]

    def _of_ids(self, per_block: Tensor) -> Tensor:
        """Values ``[B | 1, 1, 1, K]`` of the blocks in the lists."""
        return per_block.expand(*self.key_ids.shape[:3], -1).gather(-1, self.key_ids.long())

    def _keep(self, kept: Tensor) -> None:
        """Shortens the lists to some of their entries."""
        kept, order = kept.sort(dim=-1, descending=True, stable=True)
        self.key_ids = self.key_ids.gather(-1, order)
        self.whole = None if self.whole is None else self.whole.gather(-1, order)
        self.counts = kept.sum(-1)

    def most_blocks(self) -> int:
        """The most blocks any query block attends to, blocks of means included."""
        return int(self.counts.max()) + self.num_mean_blocks

    def chunks(self, item: int, head: int, blocks_per_chunk: int) -> Iterator[Tensor]:
        """Query blocks with something to attend to, most first, in chunks of bounded size and nearly equal counts."""
        counts, order = self.counts[item, head // self.heads_per_mask].sort(descending=True, stable=True)
        sizes = (counts + self.num_mean_blocks).tolist()
        first = 0
        while first < len(order) and sizes[first] > 0:
            last = first + 1
            room = first + blocks_per_chunk // sizes[first]
            while last < min(len(order), room) and 8 * sizes[last] >= 7 * sizes[first]:
                last += 1
            yield order[first:last]
            first = last

    def ids(self, item: int, head: int, block: Tensor) -> Tensor:
        """Blocks of keys to gather, ``[blocks, most]``."""
        mask_head = head // self.heads_per_mask
        ids = self.key_ids[item, mask_head, block, : int(self.counts[item, mask_head, block].max())].long()
        if self.num_mean_blocks:
            means = self.num_key_blocks + torch.arange(self.num_mean_blocks)
            ids = torch.cat([ids, means.expand(len(block), -1)], dim=1)
        return ids

    def bias(self, item: int, head: int, block: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """What to add to a chunk's scores, ``[blocks, rows | 1, columns]``, and which rows see nothing at all.

        Both are None where every column counts as it is. The bias of rows that see nothing is 0, for a softmax over
        nothing is NaN.
        """
        mask_head = head // self.heads_per_mask
        counts, position = (
            self.counts[item, mask_head, block],
            self.position[min(item, len(self.position) - 1), block, :, None],
        )
        ids = self.key_ids[item, mask_head, block, : int(counts.max())].long()
        real, token = (x[min(item, len(x) - 1), ids] for x in (self.key_blocks.real, self.key_blocks.token))
        # [blocks, 1, columns], real keys of chosen blocks
        allowed = (real & (torch.arange(ids.shape[1]) < counts[:, None])[..., None]).flatten(1)[:, None]
        if not (self.causal or self.residual or self.window) and bool(allowed.all()):
            return None, None
        key = token.flatten(1)[:, None]
        if self.causal:
            allowed = allowed & (key <= position)
        if self.window is not None:
            sink_end = self.sink_end[min(item, len(self.sink_end) - 1), block, None, None]
            seen = (key > position - self.window.size) | (key < sink_end)
            if self.whole is not None:
                whole = self.whole[item, mask_head, block, : ids.shape[1], None].expand(-1, -1, token.shape[2])
                seen = seen | whole.flatten(1)[:, None]
            allowed = allowed & seen
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
        if self.residual:
            skipped = self.skipped[item, mask_head, block, None]
            if self.causal:
                skipped = skipped & (self.key_ends[item] <= position + 1)
            # the logarithm of 0 drops empty blocks
            mean_bias = torch.where(skipped, self.log_counts[item].to(dtype), -torch.inf)
            bias = torch.cat([bias, mean_bias], dim=-1)
        blind = (bias == -torch.inf).all(-1)
        if not bool(blind.any()):
            return bias, None
        return bias.masked_fill(blind[..., None], 0.0), blind


class _Gather:
    """Picks blocks of keys and values, into one buffer for all chunks: fresh memory costs more than the copy."""

    def __init__(self, most: int, reuse: bool) -> None:
        self.most = most
        # what autograd saves must not be overwritten
        self.reuse = reuse
        self.buffer: Tensor | None = None

    def __call__(self, keys: Tensor, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        if not self.reuse:
            return keys.index_select(0, ids), values.index_select(0, ids)
        if self.buffer is None:
            self.buffer = keys.new_empty(2, self.most, *keys.shape[1:])
        key, value = self.buffer[:, : len(ids)]
        return torch.index_select(keys, 0, ids, out=key), torch.index_select(values, 0, ids, out=value)


def _with_means(blocks: Tensor, means: Tensor) -> Tensor:
    """``[N, L, D]`` with the means ``[N, D]`` in blocks of their own behind."""
    longest = blocks.shape[1]
    means = F.pad(means, (0, 0, 0, -len(means) % longest))
    return torch.cat([blocks, means.unflatten(0, (-1, longest))])


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
