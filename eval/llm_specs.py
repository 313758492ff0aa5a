"""Systems as a command line names them: ``draft:density=0.25,block_size=64``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftattn.errors import InputError

DENSE = "dense"


@dataclass(frozen=True)
class SystemSpec:
    """A system and its options, as given.

    Args:
        name: of the system, or ``"dense"`` for the model as it is.
        options: for `draftattn.pipelines.llm.apply`.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def text(self) -> str:
        """As it is written on a command line."""
        options = ",".join(f"{name}={_shown(value)}" for name, value in self.options)
        return f"{self.name}:{options}" if options else self.name

    def to_json(self) -> dict[str, Any]:
        """What is written to a file."""
        return {"system": self.name, "options": dict(self.options)}


def parse_spec(text: str) -> SystemSpec:
    """Reads ``name`` or ``name:option=value,...``; values are JSON (numbers, true, null, lists), or else text.

    Raises:
        InputError: if it is written otherwise, or there is no such system or option.

    >>> parse_spec("draft:density=0.25,block_size=64").options
    (('density', 0.25), ('block_size', 64))
    """
    name, _, rest = text.partition(":")
    options = []
    for part in _split(rest):
        option, equals, value = part.partition("=")
        if not equals or not option.strip():
            raise InputError(f"system {text!r} has {part!r}; options are written name=value, separated by commas")
        try:
            read = json.loads(value)
        except ValueError:
            read = value.strip()
        options.append((option.strip(), tuple(read) if isinstance(read, list) else read))
    spec = SystemSpec(name.strip(), tuple(options))
    if spec.name == DENSE:
        if options:
            raise InputError(f"system {text!r} has options; dense has none")
        return spec
    from draftattn.pipelines.llm.apply import make_system

    make_system(spec.name, **dict(spec.options))  # refuses here, before anything is loaded
    return spec


def parse_specs(texts: Sequence[str]) -> list[SystemSpec]:
    """Several of them, without repetitions."""
    return list(dict.fromkeys(parse_spec(text) for text in texts))


def _split(text: str) -> list[str]:
    """Parts between commas that are in no list."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace(" ", "")
