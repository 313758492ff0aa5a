"""InfLLM v2: compressed keys choose the blocks that a group of query heads attends to."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.backends import BackendName, reasons_against
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.compressed_lse import compressed_lse
from draftattn.kernels.compressed_scores import AlwaysChosen, compressed_block_scores
from draftattn.kernels.selection import select_largest
from draftattn.kernels.single_query_scores import single_query_block_scores
from draftattn.pipelines.llm.beside_cache import BesideCache
from draftattn.pipelines.llm.infllm_keys import CompressedWindows, compressed_keys
from draftattn.pipelines.llm.inputs import even_offsets
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem, SystemConfig

_CHUNK_SCORES = 2**26


@dataclass(frozen=True)
class InfLLMConfig(SystemConfig):
    """Two stages without parameters: score blocks by means of overlapping windows of keys, then attend to the best.

    Keys are averaged over windows of ``window`` tokens, one every ``stride``. The softmax of a query's scores with the
    windows it sees whole, summed over the query heads of a group, is its compressed attention; a block's score is the
    largest entry among the windows that touch it. The first blocks and the nearest ones are always chosen, and count
    among ``top_k``. One softmax over the chosen blocks gives the output, and a group shares them. Source: InfLLM v2,
    arXiv 2509.24663.

    Decoding does the same with compressed keys that are kept beside the cache. A step reads these, one byte for every
    ``2 * stride`` that dense attention reads, and ``top_k`` blocks of keys and values: less than dense attention from a
    little more than ``top_k * block_size`` tokens on. Where Python and not the GPU sets the pace, that makes no step
    shorter.

    Args:
        block_size: tokens of a block, a multiple of ``stride``, at most 128.
        top_k: blocks that a query attends to.
        initial_blocks: leading blocks that are always chosen.
        local_tokens: the nearest tokens, whose blocks are always chosen; a multiple of ``block_size``.
        window: tokens of a window of keys, twice the stride.
        stride: tokens from a window to the next.
        query_block: neighbouring queries that choose together, by their mean query. 1 is the published rule; more of
            them fill the tiles of a GPU where few heads share keys. Decoding always chooses for each query alone.
    """

    dense_len: int = 8192
    block_size: int = 64
    top_k: int = 64
    initial_blocks: int = 1
    local_tokens: int = 2048
    window: int = 32
    stride: int = 16
    query_block: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window != 2 * self.stride or self.stride < 1:
            raise InputError(f"window is {self.window} and stride {self.stride}; a window must be two strides")
        if not self.stride <= self.block_size <= 128 or self.block_size % self.stride:
            raise InputError(
                f"block_size is {self.block_size}; it must be a multiple of the stride {self.stride} up to 128"
            )
        if self.local_tokens < self.block_size or self.local_tokens % self.block_size:
            raise InputError(f"local_tokens is {self.local_tokens}; it must be a multiple of {self.block_size}")
        if self.initial_blocks < 0 or self.top_k < self.initial_blocks + self.local_tokens // self.block_size:
            raise InputError(
                f"top_k is {self.top_k} and initial_blocks {self.initial_blocks}; top_k must hold the initial blocks "
                f"and {self.local_tokens // self.block_size} local ones"
            )
        if not 1 <= self.query_block <= 128:
            raise InputError(f"query_block is {self.query_block}; it must be 1 to 128")


class InfLLM(AttentionSystem):
    """See `InfLLMConfig`."""

    name, config_class, sparse_decode = "infllm", InfLLMConfig, True

    def __init__(self, config: InfLLMConfig) -> None:
        super().__init__(config)
        self._beside: BesideCache[CompressedWindows] | None = None

    def attach(self, model: nn.Module, layers: dict[int, nn.Module]) -> None:
        """Begins to keep compressed keys beside the caches."""
        self._beside = BesideCache(layers)

    def detach(self) -> None:
        """Forgets them."""
        if self._beside is not None:
            self._beside.close()

    def mask_of(self, call: AttentionCall) -> BlockMask:
        """See `AttentionSystem.mask_of`."""
        query, key = call.query.detach(), call.key.detach()
        return infllm_mask(query, key, self.config, scale=call.scale, windows=self._windows(call, key))

    def _windows(self, call: AttentionCall, key: Tensor) -> Tensor | None:
        """Compressed keys of a call with a cache; windows that earlier calls filled are not read again."""
        if self._beside is None or call.cache is None:
            return None
        kept = self._beside.take(call)
        if kept is None:
            kept = CompressedWindows(self.config.stride)
        windows = kept.extend(key)
        self._beside.put(call, kept)
        return windows

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionSystem.attend`."""
        mask = self.mask_of(call)
        call.record(mask)
        return _attend(call.query, call.key, call.value, mask, call.scale)


def infllm_attention(
    query: Tensor, key: Tensor, value: Tensor, config: InfLLMConfig | None = None, *, scale: float | None = None
) -> Tensor:
    """Attention of every query to the blocks that its compressed attention finds.

    Args:
        query: ``[B, N, H, D]``; the last query stands at the last key.
        key: ``[B, K, H_kv, D]``.
        value: ``[B, K, H_kv, D]``.
        config: the settings; ``dense_len`` and ``dense_layers`` have no meaning here.
        scale: factor of the scores, ``D ** -0.5`` if None.

    Returns:
        ``[B, N, H, D]``.

    >>> query, key, value = torch.randn(3, 1, 200, 2, 16).unbind()
    >>> config = InfLLMConfig(block_size=32, top_k=3, local_tokens=32)
    >>> infllm_attention(query, key, value, config).shape
    torch.Size([1, 200, 2, 16])
    """
    config = InfLLMConfig() if config is None else config
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _attend(query, key, value, infllm_mask(query.detach(), key.detach(), config, scale=scale), scale)


def infllm_mask(
    query: Tensor, key: Tensor, config: InfLLMConfig, *, scale: float, windows: Tensor | None = None
) -> BlockMask:
    """The blocks that each group of query heads chooses, a mask per key head. Never waits for the device.

    ``windows`` are the compressed keys where they are known already, see `compressed_keys`.
    """
    windows = (compressed_keys(key, config.stride) if windows is None else windows).to(query.dtype)
    if query.shape[1] == 1:
        return _mask_of_one(query, windows, key.shape[1], config, scale)
    places = _places(
        query.shape[1], key.shape[1], config.query_block, config.block_size, config.window, config.stride, query.device
    )
    num_blocks = places.key_offsets.shape[0] - 1
    means = _means_of_blocks(query, config.query_block)
    lse = compressed_lse(means, windows, places.visible, scale=scale)
    chosen = []
    step = max(1, _CHUNK_SCORES // (query.shape[0] * key.shape[2] * num_blocks))
    for start in range(0, means.shape[1], step):
        part = slice(start, start + step)
        scores = compressed_block_scores(
            means[:, part],
            windows,
            lse[:, :, part],
            places.visible[part],
            num_blocks,
            block_width=config.block_size // config.stride,
            key_width=2,
            scale=scale,
            reduce="max",
            always=AlwaysChosen(places.own[part], config.initial_blocks, config.local_tokens // config.block_size),
        )
        chosen.append(select_largest(scores, min(config.top_k, num_blocks))[:2])
    counts, ids = chosen[0] if len(chosen) == 1 else (torch.cat(parts, dim=2) for parts in zip(*chosen, strict=True))
    return BlockMask(
        counts, ids, places.query_offsets, places.key_offsets, config.block_size, query_block_size=config.query_block
    )


def _mask_of_one(query: Tensor, windows: Tensor, num_keys: int, config: InfLLMConfig, scale: float) -> BlockMask:
    """The same for a single query, which stands at the last key and so sees every window."""
    query_offsets, key_offsets = _offsets_of_one(num_keys, config.block_size, query.device)
    num_blocks = key_offsets.shape[0] - 1
    scores = single_query_block_scores(
        query,
        windows,
        num_blocks,
        block_width=config.block_size // config.stride,
        key_width=2,
        scale=scale,
        initial=config.initial_blocks,
        local=config.local_tokens // config.block_size,
    )
    counts, ids = select_largest(scores, min(config.top_k, num_blocks))[:2]
    return BlockMask(counts, ids, query_offsets, key_offsets, config.block_size, query_block_size=1)


class _Places(NamedTuple):
    """Of blocks of queries and of keys the boundaries; of each block of queries what its last query sees."""

    query_offsets: Tensor
    key_offsets: Tensor
    visible: Tensor  # windows that it sees whole
    own: Tensor  # the key block in which it stands


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def _places(
    num_queries: int, num_keys: int, query_block: int, block_size: int, window: int, stride: int, device: torch.device
) -> _Places:
    query_offsets = even_offsets(num_queries, query_block, device)
    position = query_offsets[1:] - 1 + num_keys - num_queries
    visible = (position + 1 - window).div(stride, rounding_mode="floor").add_(1).clamp_(min=0)
    return _Places(query_offsets, even_offsets(num_keys, block_size, device), visible, position // block_size)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _offsets_of_one(num_keys: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boundaries of the one query and of the blocks of keys, which all layers of a decoding step share."""
    return even_offsets(1, 1, device), even_offsets(num_keys, block_size, device)


def _means_of_blocks(query: Tensor, query_block: int) -> Tensor:
    """Mean query of neighbours, ``[B, ceil(N / query_block), H, D]`` in the query's dtype."""
    if query_block == 1:
        return query
    length = query.shape[1]
    whole = length // query_block * query_block
    means = query[:, :whole].unflatten(1, (-1, query_block)).mean(2)
    return means if whole == length else torch.cat([means, query[:, whole:].mean(1, keepdim=True)], dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    # small query blocks with the group packed as rows are what the portable kernel is for
    packs = query.device.type == "cuda" and not reasons_against("triton", query, key, value, None, mask)
    backend: BackendName = "triton" if packs else "auto"
    return block_sparse_attention(query, key, value, mask, scale=scale, causal=True, backend=backend)
