"""What the time of a step is worth in a whole run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from draftattn.config import DraftConfig

WARMUPS: tuple[float, ...] = (0.25, 0.1, 0.0)


def run_seconds(
    *,
    num_steps: int,
    passes: int,
    dense_pass: float,
    sparse_pass: float,
    warmup: float,
    text: float,
    decode: float,
    cached_pass: float = 0.0,
    cache_share: float = 0.0,
) -> float:
    """Seconds of a run: text encoding, dense and sparse steps, decoding.

    The scheduler's own arithmetic, far below a thousandth of a step, is left out.

    Args:
        num_steps: denoising steps.
        passes: forward passes of a step.
        dense_pass: seconds of a dense forward pass.
        sparse_pass: seconds of a sparse one.
        warmup: share of the steps that stay dense, rounded up to whole steps.
        text: seconds of text encoding.
        decode: seconds of decoding.
        cached_pass: seconds of a pass that a step cache skips.
        cache_share: share of the sparse passes that it skips.

    >>> run_seconds(num_steps=50, passes=2, dense_pass=1.0, sparse_pass=0.5, warmup=0.25, text=1.0, decode=3.0)
    67.0
    """
    dense_steps = DraftConfig(warmup=float(warmup)).num_warmup_steps(num_steps)
    sparse_step = (1 - cache_share) * sparse_pass + cache_share * cached_pass
    return text + passes * (dense_steps * dense_pass + (num_steps - dense_steps) * sparse_step) + decode


def whole_runs(
    *,
    num_steps: int,
    passes: int,
    stock_pass: float | None,
    dense_pass: float,
    sparse_passes: Mapping[float, float],
    text: float,
    decode: float,
    warmups: Iterable[float] = WARMUPS,
    cached_pass: float = 0.0,
    cache_shares: Iterable[float] = (),
) -> list[dict[str, Any]]:
    """Whole runs for every sparsity and warm-up, against stock dense attention and the best dense attention.

    Warm-up steps run on the best dense kernel, as they do in the product.

    Args:
        num_steps: denoising steps.
        passes: forward passes of a step.
        stock_pass: seconds of a forward pass of stock diffusers; None if it did not fit into memory.
        dense_pass: seconds of one on the best dense kernel.
        sparse_passes: seconds of a sparse pass by sparsity.
        text: seconds of text encoding.
        decode: seconds of decoding.
        warmups: shares of the steps that stay dense.
        cached_pass: seconds of a pass that a step cache skips.
        cache_shares: shares of the sparse passes that it skips, each a run of its own beside the one without.

    Returns:
        For each: seconds of the three runs and the two speed-ups.
    """

    def dense(one_pass: float) -> float:
        return run_seconds(
            num_steps=num_steps,
            passes=passes,
            dense_pass=one_pass,
            sparse_pass=one_pass,
            warmup=0.0,
            text=text,
            decode=decode,
        )

    stock, best = None if stock_pass is None else dense(stock_pass), dense(dense_pass)
    runs = []
    warmups, cache_shares = tuple(warmups), tuple(cache_shares)
    for sparsity, sparse_pass in sparse_passes.items():
        for warmup, share in itertools.product(warmups, (0.0, *cache_shares)):
            seconds = run_seconds(
                num_steps=num_steps,
                passes=passes,
                dense_pass=dense_pass,
                sparse_pass=sparse_pass,
                warmup=warmup,
                text=text,
                decode=decode,
                cached_pass=cached_pass,
                cache_share=share,
            )
            runs.append(
                {
                    "sparsity": sparsity,
                    "warmup": warmup,
                    "warmup_steps": DraftConfig(warmup=float(warmup)).num_warmup_steps(num_steps),
                    "cache_share": share,
                    "stock_seconds": stock,
                    "dense_seconds": best,
                    "draft_seconds": seconds,
                    "speedup_over_stock": None if stock is None else stock / seconds,
                    "speedup_over_dense": best / seconds,
                }
            )
    return runs
