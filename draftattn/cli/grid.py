"""Options that name several prompts, seeds and settings at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from draftattn.cli import options
from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.policies import POLICY_NAMES, read_policy
from draftattn.presets import PRESETS, preset

GRID_PANEL = "Settings: lists separated by commas, every combination is made"
PROMPT_PANEL = "Prompts and seeds"

Prompt = Annotated[str | None, typer.Option(help="What the video shows; one prompt.", rich_help_panel=PROMPT_PANEL)]
PromptFile = Annotated[
    Path | None, typer.Option(help="Text file with one prompt a line.", rich_help_panel=PROMPT_PANEL)
]
VBench = Annotated[
    str | None,
    typer.Option(
        help="Prompts of a VBench dimension such as temporal_flickering, from the vbench package "
        "(pip install --no-deps vbench).",
        rich_help_panel=PROMPT_PANEL,
    ),
]
MaxPrompts = Annotated[
    int | None, typer.Option(help="Take only the first so many prompts.", rich_help_panel=PROMPT_PANEL)
]
Presets = Annotated[
    str | None,
    typer.Option("--preset", help=f"Start from these: {', '.join(PRESETS)}.", rich_help_panel=GRID_PANEL),
]
Sparsities = Annotated[
    str | None,
    typer.Option("--sparsity", help="Shares of block pairs dropped. Default 0.75.", rich_help_panel=GRID_PANEL),
]
Warmups = Annotated[
    str | None,
    typer.Option(
        "--warmup", help="Leading dense steps: shares (0.25) or numbers (5). Default 0.25.", rich_help_panel=GRID_PANEL
    ),
]
Growths = Annotated[
    str | None,
    typer.Option("--growth", help=options.GROWTH_HELP, rich_help_panel=GRID_PANEL),
]
Selections = Annotated[
    str | None, typer.Option("--selection", help="row, head. Default row.", rich_help_panel=GRID_PANEL)
]
Residuals = Annotated[
    str | None,
    typer.Option(
        "--residual", help="yes, no: whether skipped blocks contribute. Default yes.", rich_help_panel=GRID_PANEL
    ),
]
Means = Annotated[
    str | None,
    typer.Option(
        "--means",
        help="Means of the residual: weighted (by the mean query), plain. Default weighted.",
        rich_help_panel=GRID_PANEL,
    ),
]
DraftKeys = Annotated[
    str | None,
    typer.Option(
        "--draft-keys",
        help="What the mean queries of the draft meet: means (of keys), tokens (every key). Default means.",
        rich_help_panel=GRID_PANEL,
    ),
]
Tiles = Annotated[
    str | None,
    typer.Option(
        "--tile",
        help="Tiles such as 1x8x16, or rules: frame, space-time, auto. Default auto.",
        rich_help_panel=GRID_PANEL,
    ),
]
Policies = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help=f"How blocks are chosen: {', '.join(POLICY_NAMES)}; settings follow a name: xattention:mass=0.95. "
        "Default draft.",
        rich_help_panel=GRID_PANEL,
    ),
]

T = TypeVar("T")


def read_prompts(prompt: str | None, prompt_file: Path | None, vbench: str | None, most: int | None) -> list[str]:
    """The prompts that the options name.

    Raises:
        InputError: unless exactly one source is given and it holds a prompt.
    """
    from draftattn.eval import prompts

    if sum(source is not None for source in (prompt, prompt_file, vbench)) != 1:
        raise InputError("give one of --prompt, --prompt-file and --vbench")
    if most is not None and most < 1:
        raise InputError(f"max-prompts is {most}; it must be at least 1")
    if prompt is not None:
        if not prompt.strip():
            raise InputError("prompt is empty; say what the video shows")
        return [prompt]
    found = prompts.vbench_prompts(vbench) if prompt_file is None else prompts.read_prompts(prompt_file)  # type: ignore[arg-type]
    return found[:most]


def read_seeds(text: str) -> list[int]:
    """Seeds such as ``0,1,2``.

    Raises:
        InputError: if one is no seed.
    """

    def read(entry: str) -> int:
        if not entry.isdigit() or int(entry) >= 2**63:
            raise InputError(f"seeds is {text!r}; give whole numbers in [0, 2^63) such as 0,1")
        return int(entry)

    return _list("seeds", text, read)


def read_numbers(name: str, text: str) -> list[int]:
    """Whole numbers such as ``0,3,-1``.

    Raises:
        InputError: if one is not.
    """

    def read(entry: str) -> int:
        try:
            return int(entry)
        except ValueError:
            raise InputError(f"{name} is {text!r}; give whole numbers such as 0,3,-1") from None

    return _list(name, text, read)


def read_settings(
    presets: str | None,
    sparsity: str | None,
    warmup: str | None,
    selection: str | None,
    residual: str | None,
    tile: str | None,
    dense_layers: str | None,
    backend: str | None,
    policy: str | None = None,
    means: str | None = None,
    draft_keys: str | None = None,
    dense_backend: str | None = None,
    growth: str | None = None,
) -> dict[str, DraftConfig]:
    """Every combination of the values given, by name; what is not given is the preset's or the default.

    Raises:
        InputError: if a value cannot be read or is out of range.
    """
    from draftattn.eval.settings import settings_grid

    bases = [DraftConfig()] if presets is None else _list("preset", presets, preset)
    given: dict[str, tuple[str | None, Callable[[str], Any]]] = {
        "sparsity": (sparsity, lambda text: _number("sparsity", text)),
        "warmup": (warmup, options.read_warmup),
        "growth": (growth, lambda text: _number("growth", text)),
        "selection": (selection, str),
        "residual": (residual, _read_residual),
        "tile": (tile, options.read_tile),
        "policy": (policy, read_policy),
        "weighted_means": (means, _read_means),
        "draft_keys": (draft_keys, str),
    }
    axes = {name: _list(name, text, read) for name, (text, read) in given.items() if text is not None}
    if dense_layers is not None:
        axes["dense_layers"] = [options.read_layers(dense_layers)]
    if backend is not None:
        axes["backend"] = [backend]
    if dense_backend is not None:
        axes["dense_backend"] = [dense_backend]
    return settings_grid(bases, axes)


def _list(name: str, text: str, read: Callable[[str], T]) -> list[T]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise InputError(f"{name} is {text!r}; give at least one value")
    values = [read(entry) for entry in entries]
    # 1 and 1.0 are equal, but as a warm-up not the same
    return list({(type(value), value): value for value in values}.values())


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{name} is {text!r}; give numbers separated by commas") from None


def _read_means(text: str) -> bool:
    if text not in ("weighted", "plain"):
        raise InputError(f"means is {text!r}; choose from weighted, plain")
    return text == "weighted"


def _read_residual(text: str) -> bool:
    if text not in ("yes", "no"):
        raise InputError(f"residual is {text!r}; choose from yes, no")
    return text == "yes"
