"""Mask policies by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from draftattn.config import DraftConfig
    from draftattn.policy import MaskPolicy

POLICY_NAMES = ("draft",)


class PolicyConfig(Protocol):
    """Settings of a policy: a frozen dataclass that knows its policy's name and makes it."""

    name: ClassVar[str]

    def make(self, config: DraftConfig) -> MaskPolicy:
        """The policy, which may keep a state of its own: one for every transformer."""
        ...


def make_policy(config: DraftConfig) -> MaskPolicy:
    """The policy that a config names, ``config.policy``."""
    from draftattn.policies.draft import DraftPolicy

    policy: Any = config.policy
    if not isinstance(policy, str):
        made: MaskPolicy = policy.make(config)
        return made
    return DraftPolicy(config)
