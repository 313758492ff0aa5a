"""Time of a forward pass against the number of tokens and against sparsity, from a few blocks of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.eval.architectures import ARCHITECTURES, recipe_of
from draftattn.eval.bench_model import SCHEMA, check_sparsities
from draftattn.eval.contestants import Contestant, time_contestants
from draftattn.eval.environment import device_name, package_versions
from draftattn.eval.few_layers import block_counts, first_blocks
from draftattn.eval.model_gate import check_gate, stock_reference
from draftattn.eval.random_models import build_transformer, example_inputs, latent_shape, token_grid
from draftattn.eval.settings import config_to_json
from draftattn.eval.stages import free
from draftattn.pipelines.video.adapter import adapter_for

DEFAULT_TOKENS = (8_000, 16_000, 32_000, 64_000, 120_000, 240_000)
# Where a config says how many blocks a list holds.
COUNTS = {
    "blocks": "num_layers",
    "transformer_blocks": "num_layers",
    "single_transformer_blocks": "num_single_layers",
}


@dataclass(frozen=True)
class ScalingSettings:
    """What to measure.

    Args:
        tokens: about how many video tokens; the number of frames is chosen accordingly.
        sparsities: shares of blocks dropped, timed at every number of tokens.
        curve: shares of blocks dropped, timed at the recipe's number of frames.
        blocks: blocks of each kind that are run.
        repeats: timed runs of each; the median counts.
        stock: time stock diffusers too.

    Raises:
        InputError: if a value is out of range.
    """

    tokens: tuple[int, ...] = DEFAULT_TOKENS
    sparsities: tuple[float, ...] = (0.75, 0.9)
    curve: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
    blocks: int = 1
    repeats: int = 2
    stock: bool = True

    def __post_init__(self) -> None:
        check_sparsities(self.sparsities)
        if self.curve:
            check_sparsities(self.curve)
        if not self.tokens or min(self.tokens) < 1:
            raise InputError(f"tokens is {list(self.tokens)}; give at least one number, each at least 1")
        for name in ("blocks", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")


class Estimate(NamedTuple):
    """Seconds of a whole pass from a few blocks.

    Args:
        seconds: outside the blocks once, and every block as often as the model has it.
        outside: seconds with no block at all.
        block_seconds: seconds of one block of each list.
        density: share of scores computed.
        error: why there is none; None if there is.
    """

    seconds: float | None
    outside: float
    block_seconds: dict[str, float]
    density: float = 1.0
    error: str | None = None


@torch.inference_mode()
def bench_scaling(
    model: str,
    *,
    height: int | None = None,
    width: int | None = None,
    config: DraftConfig,
    settings: ScalingSettings,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Passes of stock dense, best dense and draft attention over videos of growing length.

    The model is built with a few blocks of each kind. A pass without any block and passes with the blocks of one kind
    give the time of a block and of what lies outside; a whole pass is scaled from these. The gate of
    ``bench_model`` comes first.

    Args:
        model: a published architecture.
        height: pixels; None for the model's recipe.
        width: pixels; None for the model's recipe.
        config: settings of draft attention.
        settings: what to measure.
        dtype: precision.
        device: where to run.
        on_progress: told what is being done.

    Returns:
        ``rows`` by number of tokens, ``curve`` by sparsity, and what they were measured on.

    Raises:
        InputError: if the model is not a published architecture.
        RuntimeError: if the gate is red.
    """
    if model not in ARCHITECTURES:
        raise InputError(f"model is {model!r}; scaling builds one of {', '.join(ARCHITECTURES)}")
    recipe = recipe_of(model)
    height = recipe.height if height is None else height
    width = recipe.width if width is None else width
    part = ARCHITECTURES[model].transformer
    adapter = adapter_for(part.class_name)
    frame_step = adapter.size_multiples(dict(ARCHITECTURES[model].vae.config), dict(part.config))[1]
    latent_shape(model, height, width, recipe.num_frames)  # refuses sizes before anything is built

    on_progress("building a few blocks")
    whole = {name: part.config[name] for name in set(COUNTS.values()) if name in part.config}
    transformer = build_transformer(model, dtype, device, **{name: settings.blocks for name in whole})
    full_blocks = {name: whole[COUNTS[name]] for name in block_counts(transformer)}

    def arguments_for(num_frames: int) -> dict[str, Any]:
        latents = latent_shape(model, height, width, num_frames)
        per_token = ARCHITECTURES[model].timestep_per_token
        return example_inputs(transformer, latents, dtype, device, timestep_per_token=per_token)

    tokens_per_frame = token_grid(transformer, arguments_for(1)).num_tokens
    lengths = {(max(1, round(tokens / tokens_per_frame)) - 1) * frame_step + 1 for tokens in settings.tokens}
    if settings.curve:
        lengths.add(recipe.num_frames)  # dense attention there is what the curve is compared with
    dense = replace(config, dense_layers=tuple(range(len(adapter.attention_layers(transformer)))))
    on_progress("checking that sparsity 0 and the best dense kernel equal stock attention")
    shortest = arguments_for(min(lengths))
    reference = stock_reference(transformer, shortest)
    gate = check_gate(transformer, reference, dense, replace(config, sparsity=0.0), dtype)

    def measure(num_frames: int, contestants: list[Contestant]) -> list[dict[str, Any]]:
        arguments = arguments_for(num_frames)
        tokens = token_grid(transformer, arguments).num_tokens
        rows = []
        for contestant in contestants:
            found = estimate_pass(transformer, arguments, contestant, full_blocks, settings, device)
            said = found.error or f"{found.seconds:.3f} s"
            on_progress(f"{tokens:,} tokens, {contestant.name}: {said}")
            row = {"kind": contestant.kind, "num_frames": num_frames, "tokens": tokens, **found._asdict()}
            if contestant.kind == "draft" and contestant.config is not None:
                row["sparsity"] = contestant.config.sparsity
            rows.append(row)
            free(device)
        return rows

    rows = []
    for num_frames in sorted(lengths):
        rows += measure(
            num_frames,
            [
                *([Contestant("stock", None)] if settings.stock else []),
                Contestant("dense", dense),
                *(Contestant("draft", replace(config, sparsity=sparsity)) for sparsity in settings.sparsities),
            ],
        )
    drafts = [Contestant("draft", replace(config, sparsity=sparsity)) for sparsity in settings.curve]
    curve = measure(recipe.num_frames, drafts) if drafts else []
    name = str(dtype).removeprefix("torch.")
    return {
        "schema": SCHEMA,
        "title": f"{model}, {height}×{width}, one forward pass scaled from {settings.blocks} of "
        f"{' + '.join(map(str, full_blocks.values()))} blocks and what lies outside, {name}, {device_name(device)}",
        "model": model,
        "height": height,
        "width": width,
        "dtype": name,
        "settings": {"draft": config_to_json(config), **dataclasses.asdict(settings)},
        "full_blocks": full_blocks,
        "gate": gate,
        "rows": rows,
        "curve": curve,
        "device": device_name(device),
        "versions": package_versions(),
    }


def estimate_pass(
    transformer: nn.Module,
    arguments: dict[str, Any],
    contestant: Contestant,
    full_blocks: dict[str, int],
    settings: ScalingSettings,
    device: torch.device,
) -> Estimate:
    """Scales a whole pass from one without blocks and from one with the few blocks of each list alone."""
    counts = block_counts(transformer)
    none = dict.fromkeys(counts, 0)
    outside, _ = _seconds(transformer, arguments, contestant, none, settings.repeats, device)
    if outside is None:
        return Estimate(None, 0.0, {}, error=contestant.error)
    block_seconds = {}
    density = 1.0
    for name, count in counts.items():
        seconds, density = _seconds(transformer, arguments, contestant, {**none, name: count}, settings.repeats, device)
        if seconds is None:
            return Estimate(None, outside, {}, error=contestant.error)
        block_seconds[name] = max(0.0, seconds - outside) / count
    total = outside + sum(full_blocks[name] * seconds for name, seconds in block_seconds.items())
    return Estimate(total, outside, block_seconds, density)


def _seconds(
    transformer: nn.Module,
    arguments: dict[str, Any],
    contestant: Contestant,
    counts: dict[str, int],
    repeats: int,
    device: torch.device,
) -> tuple[float | None, float]:
    run = Contestant(contestant.kind, contestant.config)
    with first_blocks(transformer, counts):
        time_contestants(transformer, arguments, [run], repeats, device, warm_blocks=max(counts.values()))
    contestant.error = run.error
    return (None, 1.0) if run.error is not None else (median(run.times), run.density)
