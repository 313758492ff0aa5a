"""Options that several commands share, and how their values become settings."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Annotated, Any, get_args

import torch
import typer

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.layout import TileRule
from draftattn.policies import POLICY_NAMES, read_policy
from draftattn.presets import PRESETS, preset

DRAFT_PANEL = "Draft attention"

Preset = Annotated[
    str | None,
    typer.Option(help=f"Start from named settings: {', '.join(PRESETS)}.", rich_help_panel=DRAFT_PANEL),
]
Sparsity = Annotated[
    float | None,
    typer.Option(help="Share of block pairs dropped, 0 to below 1. Default 0.75.", rich_help_panel=DRAFT_PANEL),
]
Warmup = Annotated[
    str | None,
    typer.Option(
        help="Leading steps kept dense: a share such as 0.25, or a number of steps such as 5. Default 0.25.",
        rich_help_panel=DRAFT_PANEL,
    ),
]
Selection = Annotated[
    str | None,
    typer.Option(
        help="How blocks are chosen: 'row', the best for every query block (default), or 'head', the published rule.",
        rich_help_panel=DRAFT_PANEL,
    ),
]
Residual = Annotated[
    bool | None,
    typer.Option(
        "--residual/--no-residual",
        help="Let skipped blocks contribute through their means (default), or drop them as published.",
        rich_help_panel=DRAFT_PANEL,
        show_default=False,
    ),
]
TileOption = Annotated[
    str | None,
    typer.Option(
        "--tile",
        help="Frames×rows×columns of tokens in a block, such as 1x8x16, or a rule that picks them for the size: "
        "frame (within one frame), space-time (of several), auto (the latter where the model allows). Default auto.",
        rich_help_panel=DRAFT_PANEL,
    ),
]
DenseLayers = Annotated[
    str | None,
    typer.Option(help="Layers that stay dense, such as 0,1,-1.", rich_help_panel=DRAFT_PANEL),
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="Kernel: auto, hopper, triton, cpu, flex, fa4 or reference; see 'draftattn doctor'.",
        rich_help_panel=DRAFT_PANEL,
    ),
]
DenseBackend = Annotated[
    str | None,
    typer.Option(
        help="Kernel of warm-up steps and dense layers: auto, hopper, fa4, cudnn, flash, or torch (the model's own).",
        rich_help_panel=DRAFT_PANEL,
    ),
]

Policy = Annotated[
    str | None,
    typer.Option(
        help=f"How blocks are chosen: {', '.join(POLICY_NAMES)}. Settings follow the name: xattention:mass=0.95.",
        rich_help_panel=DRAFT_PANEL,
    ),
]

GROWTH_HELP = (
    "How fast sparsity grows over the sparse steps, --sparsity being the mean; 0: not at all. Default "
    f"{DraftConfig().growth:g}."
)
Growth = Annotated[float | None, typer.Option(help=GROWTH_HELP, rich_help_panel=DRAFT_PANEL)]

Schedule = Annotated[
    str | None,
    typer.Option(
        help="File of 'draftattn calibrate': sparsity by layer and step, in place of --sparsity.",
        rich_help_panel=DRAFT_PANEL,
    ),
]


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """A command that an interrupt ends with one sentence and exit code 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("draftattn: interrupted; no half-written file is left", err=True)
            raise typer.Exit(130) from None

    return run


class Dtype(str, Enum):
    """Precision of the weights."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Offload(str, Enum):
    """Where weights wait when they are not in use."""

    none = "none"
    model = "model"
    sequential = "sequential"


class ContextParallel(str, Enum):
    """How several processes work on one video."""

    none = "none"
    ulysses = "ulysses"


ContextParallelOption = Annotated[
    ContextParallel,
    typer.Option(
        "--context-parallel",
        help="Under torchrun or accelerate launch: 'ulysses' lets all GPUs make one video together; otherwise every "
        "GPU takes its share of the prompts.",
    ),
]


def check_numbers(steps: int, guidance: float | None, fps: int, offload: Offload, device: torch.device) -> None:
    """Checks what any generation is asked for.

    Raises:
        InputError: if a value is out of range.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; it must be at least 1")
    if guidance is not None and guidance < 0:
        raise InputError(f"guidance is {guidance}; it must not be negative")
    if fps < 1:
        raise InputError(f"fps is {fps}; it must be at least 1")
    if offload is not Offload.none and device.type == "cpu":
        raise InputError(f"offload is {offload.value!r}; without a GPU there is nothing to offload from, use none")


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    if dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype.value)


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draft_config(
    preset_name: str | None,
    sparsity: float | None,
    warmup: str | None,
    selection: str | None,
    residual: bool | None,
    tile: str | None,
    dense_layers: str | None,
    backend: str | None,
    policy: str | None = None,
    schedule: str | None = None,
    dense_backend: str | None = None,
    growth: float | None = None,
) -> DraftConfig:
    """The settings that the options describe: those given replace the preset's.

    Raises:
        InputError: if an option cannot be read or is out of range.
    """
    given: dict[str, Any] = {
        "sparsity": sparsity,
        "warmup": None if warmup is None else read_warmup(warmup),
        "selection": selection,
        "residual": residual,
        "tile": None if tile is None else read_tile(tile),
        "dense_layers": None if dense_layers is None else read_layers(dense_layers),
        "backend": backend,
        "dense_backend": dense_backend,
        "policy": None if policy is None else read_policy(policy),
        "schedule": schedule,
        "growth": growth,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(DraftConfig() if preset_name is None else preset(preset_name), **changes)


def read_warmup(text: str) -> float | int:
    """A warm-up as the option says it: a share, or a whole number of steps.

    Raises:
        InputError: if it is neither.
    """
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError:
        raise InputError(f"warmup is {text!r}; give a share such as 0.25 or a number of steps such as 5") from None


def read_tile(text: str) -> tuple[int, int, int] | TileRule:
    """A tile such as ``1x8x16``, or the name of a rule.

    Raises:
        InputError: if it is none.
    """
    if text.strip() in get_args(TileRule):
        return text.strip()  # type: ignore[return-value]
    match = re.fullmatch(r"(\d+)[x×](\d+)[x×](\d+)", text.strip())
    if match is None:
        raise InputError(
            f"tile is {text!r}; give frames×rows×columns such as 1x8x16, or {', '.join(get_args(TileRule))}"
        )
    frames, height, width = (int(side) for side in match.groups())
    return frames, height, width


def read_layers(text: str) -> tuple[int, ...]:
    """Layer numbers such as ``0,1,-1``.

    Raises:
        InputError: if one is no number.
    """
    try:
        return tuple(int(layer) for layer in text.split(",") if layer.strip())
    except ValueError:
        raise InputError(f"dense-layers is {text!r}; give layer numbers such as 0,1,-1") from None
