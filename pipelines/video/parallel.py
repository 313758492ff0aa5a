"""One video on several GPUs: draft attention under the context parallelism of diffusers.

Under Ulysses every device holds a part of the tokens, and for attention all tokens of a part of the heads. Block masks
are made per head, so a device makes those of its own heads and nothing about draft attention changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.models.attention_dispatch import _templated_context_parallel_attention
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.layout import TokenGrid
from draftattn.pipelines.video.adapter import VideoAdapter


def check_parallelism(parallel_config: Any, name: str, adapter: VideoAdapter, grid: TokenGrid) -> None:
    """Checks that draft attention can run on a transformer with this parallelism.

    Args:
        parallel_config: diffusers' ``ParallelConfig``, or None.
        name: what to call the transformer in messages.
        adapter: its family.
        grid: the token grid of the forward call.

    Raises:
        InputError: with the reason why it cannot.
    """
    if parallel_config is None:
        return
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        raise InputError(f"{name} has tensor parallelism on; draft attention runs under ulysses_degree=… only")
    if config.ring_degree > 1:
        raise InputError(
            f"{name} has ring_degree={config.ring_degree}; ring attention shows a device one part of the keys at a "
            f"time, and draft attention must see all of them to choose: use ulysses_degree={config.ring_degree}"
        )
    if adapter.has_text_tokens:
        raise InputError(
            f"{name} has context parallelism on; its video and text tokens share a sequence, which diffusers has no "
            "plan to split: run one process per video instead"
        )
    if grid.num_tokens % config.ulysses_degree and not config.ulysses_anything:
        raise InputError(
            f"the video has {grid.num_tokens} tokens, which ulysses_degree={config.ulysses_degree} does not divide; "
            "set ulysses_anything=True in ContextParallelConfig"
        )
    if torch.is_grad_enabled():
        raise InputError(f"{name} has context parallelism on; draft attention then runs without gradients: no_grad")


def ulysses(num_heads: int, num_tokens: int, degree: int) -> ContextParallelConfig:
    """Context parallelism over ``degree`` devices; the plain kind where it divides both heads and tokens.

    >>> config = ulysses(num_heads=12, num_tokens=32760, degree=8)
    >>> config.ulysses_degree, config.ulysses_anything
    (8, True)
    """
    uneven = bool(num_heads % degree or num_tokens % degree)
    return ContextParallelConfig(ulysses_degree=degree, ulysses_anything=uneven)


def check_spread(adapter: VideoAdapter, degree: int, device: torch.device) -> None:
    """Checks, before anything is loaded, that `spread_pipeline` can spread a model over ``degree`` processes.

    Raises:
        InputError: with the reason why it cannot.
    """
    if degree < 2:
        raise InputError(
            "context parallelism spreads a video over several processes, and there is one; start them with "
            "torchrun --nproc-per-node N -m draftattn …"
        )
    if adapter.has_text_tokens:
        raise InputError(
            f"diffusers has no plan to spread {adapter.transformer_classes[0]}, whose video and text tokens share a "
            "sequence; without context parallelism every process makes videos of its own"
        )
    if device.type != "cuda":
        raise InputError(f"context parallelism of diffusers needs a GPU for each process; this one is on {device.type}")


def spread_pipeline(pipeline: Any, degree: int, num_tokens: int) -> None:
    """Spreads every video of a pipeline over the processes of the group, by Ulysses on all its transformers.

    Args:
        pipeline: the pipeline, on this process's device.
        degree: number of processes.
        num_tokens: tokens of a video.
    """
    for transformer in (pipeline.transformer, getattr(pipeline, "transformer_2", None)):
        if transformer is not None:
            config = ulysses(transformer.config.num_attention_heads, num_tokens, degree)
            transformer.enable_parallelism(config=config)


def exchange_heads(
    parallel_config: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attention over the tokens of all devices, for the heads of this one.

    Args:
        parallel_config: diffusers' ``ParallelConfig`` with Ulysses.
        query: ``[B, S_local, H, D]``, the tokens of this device.
        key: ``[B, S_local, H, D]``.
        value: ``[B, S_local, H, D]``.
        attention: from ``[B, S, H_local, D]`` to the same.

    Returns:
        ``[B, S_local, H, D]``.

    Raises:
        InputError: if the devices cannot share the heads.
    """
    config, heads = parallel_config.context_parallel_config, query.shape[2]
    if heads % config.ulysses_degree and not config.ulysses_anything:
        raise InputError(
            f"{heads} heads cannot be shared by ulysses_degree={config.ulysses_degree}; choose a divisor, or set "
            "ulysses_anything=True in ContextParallelConfig"
        )

    def forward_op(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        del ctx, rest, options
        return attention(query, key, value)

    return _templated_context_parallel_attention(
        query, key, value, forward_op=forward_op, backward_op=None, _parallel_config=parallel_config
    )


def output_split(module: nn.Module, name: str) -> Callable[[Any], Any] | None:
    """What context parallelism does to a module's output: keeps this device's tokens; None if nothing.

    Args:
        module: a direct child of the transformer.
        name: its attribute there.
    """
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(f"cp_input---{name}")
    if hook is None:
        return None
    return lambda output: hook.post_forward(module, output)
