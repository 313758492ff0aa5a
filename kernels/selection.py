"""From scores of block pairs to lists of blocks.

Nothing here waits for the device. On a GPU each function is a kernel that reads a row of scores once; elsewhere, and
for rows of more than 16,384 blocks, it is plain torch. Both keep the same blocks, ties included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from draftattn.kernels.dispatch import triton_serves

_MAX_COLUMNS = 16_384  # of a row that a program holds in registers


class BlockSelection(NamedTuple):
    """Chosen key blocks of every query block.

    Args:
        kv_num_blocks: int32 ``[B, H, Q]``, how many there are.
        kv_indices: int32 ``[B, H, Q, C]``, their ids, ascending and left-packed; zeros after them.
        block_map: bool ``[B, H, Q, K]``, the same as a map.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_map: Tensor


def select_largest(
    scores: Tensor,
    num_kept: int,
    *,
    bias: Tensor | None = None,
    keep_diagonal: bool = False,
    dense_tail: int = 0,
) -> BlockSelection:
    """Keeps the largest scores of every row; of equal ones those of the lowest id.

    Args:
        scores: ``[B, H, Q, K]``. Pairs of score ``-inf`` are never kept, so that a row may keep fewer; NaN counts as
            infinity.
        num_kept: entries that a row keeps, 1 to ``K``.
        bias: float32 ``[K]``, added to every row.
        keep_diagonal: row ``i`` keeps entry ``i`` whatever its score, and counts it among ``num_kept``.
        dense_tail: query and key blocks after those of the scores that attend to everything and that everything
            attends to; ``Q`` and ``K`` of the outputs include them.

    Returns:
        The selection, with lists of ``num_kept`` places, or of all blocks where there is a tail.

    Raises:
        ValueError: if shapes or numbers are out of range.

    >>> select_largest(torch.tensor([[[[0.3, 0.1, 0.6], [0.2, 0.2, 0.2]]]]), 2).kv_indices[0, 0].tolist()
    [[0, 2], [0, 1]]
    """
    num_columns = _check_scores(scores, dense_tail)
    if not 1 <= num_kept <= num_columns:
        raise ValueError(f"num_kept is {num_kept}; a row of {num_columns} scores keeps 1 to {num_columns}")
    if bias is not None and (bias.shape != (num_columns,) or bias.dtype != torch.float32):
        raise ValueError(f"bias must be float32 [{num_columns}]; got {bias.dtype} {list(bias.shape)}")
    if not _kernel_serves(scores, dense_tail):
        return select_largest_reference(scores, num_kept, bias, keep_diagonal, dense_tail)
    if torch.compiler.is_compiling():
        return BlockSelection(*_select_largest_op(scores, num_kept, bias, keep_diagonal, dense_tail))
    from draftattn.kernels import triton_selection

    return BlockSelection(*triton_selection.select_largest(scores, num_kept, bias, keep_diagonal, dense_tail))


def select_from_rank(scores: Tensor, rank: int, *, dense_tail: int = 0) -> BlockSelection:
    """Keeps, of each head, the scores from the ``rank``-th smallest on: that one, its equals and all larger ones.

    A row that would keep nothing keeps its largest score, with its equals.

    Args:
        scores: ``[B, H, Q, K]``; NaN counts as infinity.
        rank: 0 to ``Q * K``; 0 keeps everything.
        dense_tail: see `select_largest`.

    Returns:
        The selection, with lists of all blocks' length.

    Raises:
        ValueError: if shapes or numbers are out of range.

    >>> select_from_rank(torch.tensor([[[[0.3, 0.1], [0.4, 0.5]]]]), 3).block_map[0, 0].tolist()
    [[True, False], [True, True]]
    """
    num_columns = _check_scores(scores, dense_tail)
    num_scores = scores.shape[2] * num_columns
    if not 0 <= rank <= num_scores:
        raise ValueError(f"rank is {rank}; {num_scores} scores a head have ranks 1 to {num_scores}, or 0 for all")
    if rank == 0:
        return _select_all(scores, dense_tail)
    if not _kernel_serves(scores, dense_tail) or num_scores >= 2**31:
        return select_from_rank_reference(scores, rank, dense_tail)
    if torch.compiler.is_compiling():
        return BlockSelection(*_select_from_rank_op(scores, rank, dense_tail))
    from draftattn.kernels import triton_selection

    return BlockSelection(*triton_selection.select_from_rank(scores, rank, dense_tail))


def list_blocks(block_map: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """Lists the true entries of every row of a map.

    Args:
        block_map: bool ``[B, H, Q, K]``.
        capacity: length of the lists, ``K`` if None; of a row with more entries they hold the first.

    Returns:
        ``kv_num_blocks`` int32 ``[B, H, Q]`` and ``kv_indices`` int32 ``[B, H, Q, capacity]``, as in `BlockSelection`.

    >>> [x[0, 0].tolist() for x in list_blocks(torch.tensor([[[[True, False, True], [False, True, False]]]]), 2)]
    [[2, 1], [[0, 2], [1, 0]]]
    """
    capacity = block_map.shape[-1] if capacity is None else capacity
    if not triton_serves(block_map) or max(block_map.shape[-1], capacity) > _MAX_COLUMNS:
        return list_blocks_reference(block_map, capacity)
    if torch.compiler.is_compiling():
        return _list_blocks_op(block_map, capacity)
    from draftattn.kernels import triton_selection

    return triton_selection.list_blocks(block_map, capacity)


def density_of_lists(kv_num_blocks: Tensor, kv_indices: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> Tensor:
    """Share of all query-key pairs that lie in listed blocks, over all batch items and heads.

    Args:
        kv_num_blocks: int32 ``[B | 1, H, Q]``.
        kv_indices: int32 ``[B | 1, H, Q, C]``.
        query_offsets: int32 ``[Q + 1]``.
        key_offsets: int32 ``[K + 1]`` or ``[B, K + 1]``.

    Returns:
        A float64 scalar.

    >>> ids, offsets = torch.tensor([[[[0, 2], [1, 0]]]]), torch.tensor([0, 4, 9, 10], dtype=torch.int32)
    >>> density_of_lists(torch.tensor([[[2, 1]]]), ids, torch.tensor([0, 2, 4]), offsets).item()
    0.5
    """
    if not triton_serves(kv_indices):
        return density_of_lists_reference(kv_num_blocks, kv_indices, query_offsets, key_offsets)
    if torch.compiler.is_compiling():
        return _density_of_lists_op(kv_num_blocks, kv_indices, query_offsets, key_offsets)
    from draftattn.kernels import triton_selection

    return triton_selection.density_of_lists(kv_num_blocks, kv_indices, query_offsets, key_offsets)


def select_largest_reference(
    scores: Tensor, num_kept: int, bias: Tensor | None, keep_diagonal: bool, dense_tail: int
) -> BlockSelection:
    """``select_largest`` in plain torch."""
    scores = _comparable(scores if bias is None else scores + bias)
    allowed = scores > -torch.inf
    if keep_diagonal:
        diagonal = torch.eye(*scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores, allowed = scores.masked_fill(diagonal, torch.inf), allowed | diagonal
    smallest = scores.topk(num_kept, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > smallest, (scores == smallest) & allowed
    if keep_diagonal:
        above, equal = above | diagonal, equal & ~diagonal
    room = num_kept - above.sum(-1, dtype=torch.int32, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    return _with_tail(kept, dense_tail, num_kept)


def select_from_rank_reference(scores: Tensor, rank: int, dense_tail: int) -> BlockSelection:
    """``select_from_rank`` in plain torch."""
    scores = _comparable(scores)
    threshold = scores.flatten(-2).kthvalue(rank, dim=-1).values[..., None, None]
    return _with_tail(scores >= torch.minimum(threshold, scores.amax(-1, keepdim=True)), dense_tail)


def list_blocks_reference(block_map: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """``list_blocks`` in plain torch."""
    rank = block_map.cumsum(-1, dtype=torch.int32)
    # Each chosen id moves to its rank; all others go to a spare last slot.
    slot = torch.where(block_map, rank - 1, capacity).long()
    ids = torch.arange(block_map.shape[-1], dtype=torch.int32, device=block_map.device).expand(block_map.shape)
    kv_indices = torch.zeros(*block_map.shape[:3], capacity + 1, dtype=torch.int32, device=block_map.device)
    kv_indices.scatter_(-1, slot.clamp_(max=capacity), ids)
    return block_map.sum(-1, dtype=torch.int32).clamp(max=capacity), kv_indices[..., :-1].contiguous()


def density_of_lists_reference(
    kv_num_blocks: Tensor, kv_indices: Tensor, query_offsets: Tensor, key_offsets: Tensor
) -> Tensor:
    """``density_of_lists`` in plain torch."""
    lengths = torch.atleast_2d(key_offsets).diff(dim=-1)
    used = torch.arange(kv_indices.shape[-1], device=kv_indices.device) < kv_num_blocks[..., None]
    batch = max(len(kv_indices), len(lengths))
    ids = kv_indices.long().expand(batch, -1, -1, -1)
    listed = lengths.expand(batch, -1).gather(1, ids.flatten(1)).view(ids.shape)
    # a video has more pairs than an int32 counts
    keys = torch.where(used, listed, 0).sum(-1, dtype=torch.float64)
    pairs = (keys * query_offsets.diff()).sum(-1)
    num_queries, num_keys = query_offsets.diff().sum(), lengths.sum(-1, keepdim=True)
    return (pairs / (num_queries.double() * num_keys)).mean()


def _check_scores(scores: Tensor, dense_tail: int) -> int:
    if scores.ndim != 4 or not scores.is_floating_point():
        raise ValueError(f"scores must be floats [B, H, Q, K]; got {scores.dtype} {list(scores.shape)}")
    if dense_tail < 0:
        raise ValueError(f"dense_tail is {dense_tail}; it must not be negative")
    return scores.shape[-1]


def _kernel_serves(scores: Tensor, dense_tail: int) -> bool:
    exact = scores.dtype != torch.float64
    return triton_serves(scores) and exact and scores.shape[-1] + dense_tail <= _MAX_COLUMNS


def _comparable(scores: Tensor) -> Tensor:
    return scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _with_tail(kept: Tensor, dense_tail: int, capacity: int | None = None) -> BlockSelection:
    if dense_tail:
        kept = torch.nn.functional.pad(kept, (0, dense_tail, 0, dense_tail), value=True)
        capacity = None
    return BlockSelection(*list_blocks_reference(kept, capacity or kept.shape[-1]), kept)


def _select_all(scores: Tensor, dense_tail: int) -> BlockSelection:
    batch, heads, rows, columns = scores.shape
    shape = batch, heads, rows + dense_tail, columns + dense_tail
    counts = scores.new_full(shape[:3], shape[-1], dtype=torch.int32)
    ids = torch.arange(shape[-1], dtype=torch.int32, device=scores.device).expand(shape).contiguous()
    return BlockSelection(counts, ids, scores.new_ones(shape, dtype=torch.bool))


def _fake_selection(scores: Tensor, dense_tail: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, columns = scores.shape
    rows, columns = rows + dense_tail, columns + dense_tail
    return (
        scores.new_empty(batch, heads, rows, dtype=torch.int32),
        scores.new_empty(batch, heads, rows, capacity, dtype=torch.int32),
        scores.new_empty(batch, heads, rows, columns, dtype=torch.bool),
    )


@torch.library.custom_op(
    "draftattn::select_largest",
    mutates_args=(),
    schema="(Tensor scores, int num_kept, Tensor? bias, bool keep_diagonal, int dense_tail)"
    " -> (Tensor, Tensor, Tensor)",
)
def _select_largest_op(
    scores: Tensor, num_kept: int, bias: Tensor | None, keep_diagonal: bool, dense_tail: int
) -> tuple[Tensor, Tensor, Tensor]:
    from draftattn.kernels import triton_selection

    return triton_selection.select_largest(scores, num_kept, bias, keep_diagonal, dense_tail)


@_select_largest_op.register_fake
def _(
    scores: Tensor, num_kept: int, bias: Tensor | None, keep_diagonal: bool, dense_tail: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_selection(scores, dense_tail, scores.shape[-1] + dense_tail if dense_tail else num_kept)


@torch.library.custom_op(
    "draftattn::select_from_rank",
    mutates_args=(),
    schema="(Tensor scores, int rank, int dense_tail) -> (Tensor, Tensor, Tensor)",
)
def _select_from_rank_op(scores: Tensor, rank: int, dense_tail: int) -> tuple[Tensor, Tensor, Tensor]:
    from draftattn.kernels import triton_selection

    return triton_selection.select_from_rank(scores, rank, dense_tail)


@_select_from_rank_op.register_fake
def _(scores: Tensor, rank: int, dense_tail: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_selection(scores, dense_tail, scores.shape[-1] + dense_tail)


@torch.library.custom_op(
    "draftattn::list_blocks", mutates_args=(), schema="(Tensor block_map, int capacity) -> (Tensor, Tensor)"
)
def _list_blocks_op(block_map: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    from draftattn.kernels import triton_selection

    return triton_selection.list_blocks(block_map, capacity)


@_list_blocks_op.register_fake
def _(block_map: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    rows = block_map.shape[:3]
    return block_map.new_empty(rows, dtype=torch.int32), block_map.new_empty(*rows, capacity, dtype=torch.int32)


@torch.library.custom_op("draftattn::density_of_lists", mutates_args=())
def _density_of_lists_op(
    kv_num_blocks: Tensor, kv_indices: Tensor, query_offsets: Tensor, key_offsets: Tensor
) -> Tensor:
    from draftattn.kernels import triton_selection

    return triton_selection.density_of_lists(kv_num_blocks, kv_indices, query_offsets, key_offsets)


@_density_of_lists_op.register_fake
def _(kv_num_blocks: Tensor, kv_indices: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> Tensor:
    del kv_indices, query_offsets, key_offsets
    return kv_num_blocks.new_empty((), dtype=torch.float64)
