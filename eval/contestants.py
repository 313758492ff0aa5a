"""Ways to run one transformer, timed and profiled in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.eval.few_layers import block_counts, first_blocks
from draftattn.eval.stages import free, timed
from draftattn.eval.step_profile import profile_step
from draftattn.pipelines.video.adapter import adapter_for
from draftattn.pipelines.video.enable import DraftHandle, disable, enable

OUT_OF_MEMORY = "out of memory"


@dataclass
class Contestant:
    """One way to run the transformer, and what was measured of it.

    Args:
        kind: ``"stock"``, ``"dense"`` or ``"draft"``.
        config: draft attention's settings; None for stock diffusers.
    """

    kind: str
    config: DraftConfig | None
    times: list[float] = field(default_factory=list)
    peak_memory_gib: float | None = None
    density: float = 1.0
    mask_times: list[float] = field(default_factory=list)
    error: str | None = None
    profile: dict[str, Any] | None = None
    output: Tensor | None = None

    @property
    def name(self) -> str:
        """In words."""
        return f"draft {self.config.sparsity:g}" if self.kind == "draft" and self.config is not None else self.kind

    @property
    def seconds(self) -> float | None:
        """Median of one pass; None if it could not run."""
        return median(self.times) if self.times and self.error is None else None


def time_contestants(
    transformer: nn.Module,
    arguments: dict[str, Any],
    contestants: Sequence[Contestant],
    repeats: int,
    device: torch.device,
    on_progress: Callable[[str], None] = lambda message: None,
    warm_blocks: int = 1,
) -> None:
    """Times whole passes in turns, after one of each through the first blocks alone, which compiles every kernel.

    A contestant that fails, for want of memory or else, says so in its ``error`` and takes no further part.

    Args:
        transformer: the model.
        arguments: of its forward.
        contestants: how to run it; the figures are added to them.
        repeats: timed passes of each.
        device: where it runs.
        on_progress: told what is being done.
        warm_blocks: blocks of each list in the untimed pass.
    """
    warm = {name: min(warm_blocks, count) for name, count in block_counts(transformer).items()}
    for contestant in contestants:
        on_progress(f"warming up: {contestant.name}")
        with first_blocks(transformer, warm):
            _run(transformer, arguments, contestant, device)
        contestant.times.clear()
        contestant.mask_times.clear()
    for i in range(repeats):
        for contestant in contestants:
            if contestant.error is None:
                _run(transformer, arguments, contestant, device)
                taken = contestant.error or f"{contestant.times[-1]:.3f} s"
                on_progress(f"pass {i + 1} of {repeats}, {contestant.name}: {taken}")


def profile_contestants(
    transformer: nn.Module,
    arguments: dict[str, Any],
    contestants: Sequence[Contestant],
    device: torch.device,
    on_progress: Callable[[str], None],
) -> None:
    """One more pass of each but stock diffusers, split by what its time goes to."""
    for contestant in contestants:
        if contestant.config is None or contestant.error is not None:
            continue
        on_progress(f"profiling {contestant.name}")
        with _enabled(transformer, contestant.config):
            found = profile_step(lambda: transformer(**arguments), device)
        contestant.profile = {"seconds": found.seconds, "parts": found.parts, "overhead": found.overhead}


def _enabled(transformer: nn.Module, config: DraftConfig) -> DraftHandle:
    """Draft attention on; dense layers that a cut transformer does not have are left out."""
    layers = len(adapter_for(type(transformer).__name__).attention_layers(transformer))
    kept = tuple(layer for layer in config.dense_layers if -layers <= layer < layers)
    return enable(transformer, replace(config, dense_layers=kept))


def _run(transformer: nn.Module, arguments: dict[str, Any], contestant: Contestant, device: torch.device) -> None:
    output: list[Tensor] = []
    try:
        handle = None if contestant.config is None else _enabled(transformer, contestant.config)
        seconds, contestant.peak_memory_gib = timed(lambda: output.append(transformer(**arguments)[0]), device)
        contestant.times.append(seconds)
        contestant.output = output[0]
        if handle is not None:
            stats = handle.stats()
            contestant.density = stats.density
            contestant.mask_times.append(stats.mask_seconds)
    except torch.OutOfMemoryError:
        contestant.error = OUT_OF_MEMORY
    except RuntimeError as error:  # one that fails, in the compiler for instance, leaves the others their turn
        contestant.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    disable(transformer)
    if contestant.error is not None:
        free(device)


def time_cached_pass(
    transformer: Any, arguments: dict[str, Any], config: DraftConfig, repeats: int, device: torch.device
) -> float:
    """Seconds of a pass that diffusers' FirstBlockCache skips: it runs the first block and what lies outside.

    Measured on the first two blocks of each list, whatever their number, since the others do not run.

    Raises:
        InputError: if diffusers has no such cache for the model.
        RuntimeError: if the cache skipped nothing.
    """
    from diffusers import FirstBlockCacheConfig

    times = []
    with first_blocks(transformer, {name: min(2, count) for name, count in block_counts(transformer).items()}):
        handle = _enabled(transformer, config)
        try:
            transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        except ValueError as error:
            disable(transformer)
            raise InputError(f"diffusers' FirstBlockCache cannot run on {type(transformer).__name__}") from error
        try:
            with transformer.cache_context("bench"):
                transformer(**arguments)
                for _ in range(repeats):
                    handle.reset_stats()
                    times.append(timed(lambda: transformer(**arguments), device)[0])
                    if len(handle.stats().calls) != 1:
                        raise RuntimeError("the cache skipped nothing")
        finally:
            transformer.disable_cache()
            disable(transformer)
    return median(times)
