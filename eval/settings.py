"""Settings to compare: a grid of draft configs, each with a name that says what it is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.policies import policy_text

_ALWAYS_NAMED = ("sparsity", "warmup", "selection", "residual", "policy")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DraftConfig)}


def setting_name(config: DraftConfig) -> str:
    """A name for a config, fit for a file: the same for equal configs, different for different ones.

    >>> setting_name(DraftConfig(sparsity=0.9, warmup=5))
    'sparsity0.9-warmup5steps-row-residual'
    >>> setting_name(DraftConfig(selection="head", residual=False, tile=(1, 8, 16)))
    'sparsity0.75-warmup0.25-head-noresidual-tile1x8x16'
    >>> setting_name(DraftConfig(policy="svg"))
    'sparsity0.75-warmup0.25-svg-residual'
    """
    steps = isinstance(config.warmup, int) and config.warmup > 0
    warmup = f"{config.warmup}steps" if steps else f"{config.warmup:g}"
    residual = "residual" if config.residual else "noresidual"
    chosen_by = config.selection if config.policy == "draft" else _fit_for_file(policy_text(config.policy))
    parts = [f"sparsity{config.sparsity:g}", f"warmup{warmup}", chosen_by, residual]
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
    return {"name": name} | config_to_json(config)


def config_to_json(config: DraftConfig) -> dict[str, Any]:
    """The fields of a config, as JSON gives them back; its policy as the text that names it."""
    fields = dataclasses.asdict(config) | {"policy": policy_text(config.policy)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def _fit_for_file(text: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", text.replace("-", "minus"))
