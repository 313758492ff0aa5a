"""Who takes part in a contest of mask policies."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.policies import read_policy

PUBLISHED = "published"
DEFAULT_CONTENDERS = "published,draft,svg,adaspa,xattention,radial,sliding_tile,sparge,carve,oracle,random"
_IN_SPACE_AND_TIME = ("sliding_tile", "carve")
_CHANGES: dict[str, dict[str, Any]] = {
    "residual": {"residual": True},
    "plain": {"residual": False},
    "frame": {"tile": "frame"},
    "space-time": {"tile": "space-time"},
    "tokens": {"draft_keys": "tokens"},
}


def read_contenders(text: str, base: DraftConfig) -> dict[str, DraftConfig]:
    """Contenders by name, in the order of a list separated by commas.

    ``published`` is draft attention as its paper has it, ``draft`` the default; all others are policies as
    `draftattn.policies.read_policy` reads them, as published: without the residual, at one sparsity in all steps, in
    tiles of one frame, or of several for those that were published so. After a name, ``+residual`` gives it the
    residual, ``+plain`` takes it away, ``+frame`` and ``+space-time`` choose the tiles, ``+tokens`` scores blocks by
    all their keys and ``+growth=0.6`` sets how fast sparsity grows. A tile of ``base`` that is not the default serves
    all.

    Raises:
        InputError: if a name is unknown.

    >>> [(name, x.residual) for name, x in read_contenders("draft,svg,svg+residual", DraftConfig()).items()]
    [('draft', True), ('svg', False), ('svg+residual', True)]
    """
    found: dict[str, DraftConfig] = {}
    for name in (part.strip() for part in text.split(",") if part.strip()):
        policy, *changes = name.split("+")
        if policy == PUBLISHED:
            config = replace(base, policy="draft", selection="head", draft_keys="means", residual=False, growth=0.0)
        elif policy == "draft":
            config = base
        else:
            config = replace(base, policy=read_policy(policy), residual=False, growth=0.0)
        if base.tile == DraftConfig().tile and policy != "draft":
            config = replace(config, tile="space-time" if policy.partition(":")[0] in _IN_SPACE_AND_TIME else "frame")
        for change in changes:
            config = replace(config, **_read_change(name, change))
        found[name] = config
    return found


def _read_change(name: str, change: str) -> dict[str, Any]:
    if change in _CHANGES:
        return _CHANGES[change]
    growth = re.fullmatch(r"growth=(\d*\.?\d+)", change)
    if growth is None:
        raise InputError(f"policies holds {name!r}; after + write {', '.join(_CHANGES)}, growth=0.6")
    return {"growth": float(growth[1])}
