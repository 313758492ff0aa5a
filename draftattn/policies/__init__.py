"""Mask policies by name."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from draftattn.errors import InputError

if TYPE_CHECKING:
    from draftattn.config import DraftConfig
    from draftattn.policy import MaskPolicy

POLICY_NAMES = (
    "draft",
    "svg",
    "adaspa",
    "xattention",
    "radial",
    "sliding_tile",
    "sparge",
    "carve",
    "oracle",
    "random",
)


class PolicyConfig(Protocol):
    """Settings of a policy: a frozen dataclass that knows its policy's name and makes it.

    ``matched_by`` says what sets the density: ``"sparsity"`` of `DraftConfig`, or a field of the settings.
    """

    name: ClassVar[str]
    matched_by: ClassVar[str]

    def make(self, config: DraftConfig) -> MaskPolicy:
        """The policy, which may keep a state of its own: one for every transformer."""
        ...


def policy_settings(name: str) -> PolicyConfig | None:
    """The default settings of a policy; None for ``"draft"``, whose settings are those of `DraftConfig`.

    Raises:
        InputError: if there is no policy of that name.

    >>> policy_settings("xattention").mass
    0.9
    """
    match name:
        case "draft":
            return None
        case "svg":
            from draftattn.policies.svg import SvgConfig

            return SvgConfig()
        case "adaspa":
            from draftattn.policies.adaspa import AdaSpaConfig

            return AdaSpaConfig()
        case "xattention":
            from draftattn.policies.xattention import XAttentionConfig

            return XAttentionConfig()
        case "radial":
            from draftattn.policies.radial import RadialConfig

            return RadialConfig()
        case "sliding_tile":
            from draftattn.policies.sliding_tile import SlidingTileConfig

            return SlidingTileConfig()
        case "sparge":
            from draftattn.policies.sparge import SpargeConfig

            return SpargeConfig()
        case "carve":
            from draftattn.policies.carve import CarveConfig

            return CarveConfig()
        case "oracle":
            from draftattn.policies.oracle import OracleConfig

            return OracleConfig()
        case "random":
            from draftattn.policies.random import RandomConfig

            return RandomConfig()
        case _:
            raise InputError(f"policy is {name!r}; choose from {', '.join(POLICY_NAMES)}")


def make_policy(config: DraftConfig) -> MaskPolicy:
    """The policy that a config names, ``config.policy``."""
    settings: Any = policy_settings(config.policy) if isinstance(config.policy, str) else config.policy
    if settings is None:
        from draftattn.policies.draft import DraftPolicy

        return DraftPolicy(config)
    policy: MaskPolicy = settings.make(config)
    return policy


def read_policy(text: str) -> str | PolicyConfig:
    """A policy as an option says it: a name, or a name and settings of that policy.

    Raises:
        InputError: if there is no such policy or setting, or a value is out of range.

    >>> read_policy("svg"), read_policy("xattention:mass=0.95").mass
    ('svg', 0.95)
    """
    name, *given = (part.strip() for part in text.split(":"))
    default: Any = policy_settings(name)
    if not given:
        return name
    fields = [] if default is None else [field.name for field in dataclasses.fields(default)]
    if not fields:
        raise InputError(f"policy is {text!r}; {name!r} has no settings of its own")
    changes: dict[str, Any] = {}
    for part in given:
        field, equals, value = part.partition("=")
        if not equals or field not in fields:
            raise InputError(f"policy is {text!r}; {name!r} takes {', '.join(f'{field}=…' for field in fields)}")
        changes[field] = _read_value(text, value)
    settings: PolicyConfig = dataclasses.replace(default, **changes)
    return settings


def policy_text(policy: str | PolicyConfig) -> str:
    """The text that `read_policy` reads as this policy: its name, and what is not at its default.

    >>> policy_text(read_policy("xattention:mass=0.95:stride=8"))
    'xattention:mass=0.95'
    """
    if isinstance(policy, str):
        return policy
    settings: Any = policy
    changed = [
        f"{field.name}={_shown(getattr(settings, field.name))}"
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    ]
    return ":".join([policy.name, *changed])


def _read_value(text: str, value: str) -> Any:
    if value in ("yes", "no"):
        return value == "yes"
    if re.fullmatch(r"\d+[x×]\d+[x×]\d+", value):
        return tuple(int(side) for side in re.split("[x×]", value))
    try:
        return int(value) if re.fullmatch(r"-?\d+", value) else float(value)
    except ValueError:
        raise InputError(
            f"policy is {text!r}; {value!r} is no number, no yes or no, and no size such as 3x2x2"
        ) from None


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
