"""Who takes part in a contest of mask policies."""

from __future__ import annotations

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
    `draftattn.policies.read_policy` reads them, as published: without the residual, in tiles of one frame, or of
    several for those that were published so. After a name, ``+residual`` gives it the residual, ``+plain`` takes it
    away, ``+frame`` and ``+space-time`` choose the tiles, and ``+tokens`` scores blocks by all their keys. A tile of
    ``base`` that is not the default serves all.

    Raises:
        InputError: if a name is unknown.

    >>> [(name, x.residual) for name, x in read_contenders("draft,svg,svg+residual", DraftConfig()).items()]
    [('draft', True), ('svg', False), ('svg+residual', True)]
    """
    found: dict[str, DraftConfig] = {}
    for name in (part.strip() for part in text.split(",") if part.strip()):
        policy, *changes = name.split("+")
        if policy == PUBLISHED:
            config = replace(base, policy="draft", selection="head", draft_keys="means", residual=False)
        elif policy == "draft":
            config = base
        else:
            config = replace(base, policy=read_policy(policy), residual=False)
        if base.tile == DraftConfig().tile and policy != "draft":
            config = replace(config, tile="space-time" if policy.partition(":")[0] in _IN_SPACE_AND_TIME else "frame")
        for change in changes:
            if change not in _CHANGES:
                raise InputError(f"policies holds {name!r}; after + write {', '.join(_CHANGES)}")
            config = replace(config, **_CHANGES[change])
        found[name] = config
    return found
