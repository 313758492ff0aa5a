"""Settings to compare: a grid of draft configs, each with a name that says what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from draftattn.config import DraftConfig
from draftattn.errors import InputError

_ALWAYS_NAMED = ("sparsity", "warmup", "selection", "residual")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DraftConfig)}


def setting_name(config: DraftConfig) -> str:
    """A name for a config, fit for a file: the same for equal configs, different for different ones.

    >>> setting_name(DraftConfig(sparsity=0.9, warmup=5))
    'sparsity0.9-warmup5steps-row-residual'
    >>> setting_name(DraftConfig(selection="head", residual=False, tile=(1, 8, 16)))
    'sparsity0.75-warmup0.25-head-noresidual-tile1x8x16'
    """
    steps = isinstance(config.warmup, int) and config.warmup > 0
    warmup = f"{config.warmup}steps" if steps else f"{config.warmup:g}"
    residual = "residual" if config.residual else "noresidual"
    parts = [f"sparsity{config.sparsity:g}", f"warmup{warmup}", config.selection, residual]
    for name, default in _DEFAULTS.items():
        value = getattr(config, name)
        if name not in _ALWAYS_NAMED and value != default:
            shown = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts.append(f"{name.replace('_', '')}{shown}")
    return "-".join(parts)


def settings_grid(bases: Iterable[DraftConfig], axes: Mapping[str, Sequence[Any]]) -> dict[str, DraftConfig]:
    """Every combination of values, on top of every base; equal configs count once.

    Args:
        bases: configs whose other fields are kept.
        axes: field of `DraftConfig` to the values it takes.

    Raises:
        InputError: if a value is out of range, or there is no setting at all.

    >>> list(settings_grid([DraftConfig()], {"sparsity": [0.5, 0.9], "warmup": [0.25]}))
    ['sparsity0.5-warmup0.25-row-residual', 'sparsity0.9-warmup0.25-row-residual']
    """
    grid: dict[str, DraftConfig] = {}
    for base in bases:
        for values in product(*axes.values()):
            config = dataclasses.replace(base, **dict(zip(axes, values, strict=True)))
            grid[setting_name(config)] = config
    if not grid:
        raise InputError("there are no settings to compare; give at least one value of each")
    return grid


def setting_to_json(name: str, config: DraftConfig) -> dict[str, Any]:
    """Name and fields of a setting, as JSON gives them back."""
    fields = dataclasses.asdict(config)
    return {"name": name} | {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
