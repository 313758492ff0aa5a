"""Systems as a command line names them: ``draft:density=0.25,block_size=64``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftattn.errors import InputError

DENSE = "dense"
SWEEP_DENSITIES = (0.5, 0.25, 0.125)
SWEEP_MASSES = (0.95, 0.9, 0.8)
SHORTEST_SWEEP = 2048


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


def density_sweep(length: int) -> list[SystemSpec]:
    """Every system that needs no training, at three settings each, for a text of a length: no layer stays dense.

    Systems with a budget aim at a half, a quarter and an eighth of the causal pairs, in blocks of 64; those that keep a
    share of the attention's mass keep 95, 90 and 80 % of it. What they realise is for the measurement to say.

    Args:
        length: tokens of the text.

    Raises:
        InputError: if it is shorter than 2,048 tokens.

    >>> [spec.text for spec in density_sweep(4096) if spec.name == "infllm"][0]
    'infllm:top_k=19,local_tokens=256,dense_len=0'
    """
    if length < SHORTEST_SWEEP:
        raise InputError(f"length is {length}; a sweep of densities needs {SHORTEST_SWEEP} tokens or more")

    def blocks(share: float) -> int:
        return max(1, round(share * length / 64))

    texts = []
    for density, mass in zip(SWEEP_DENSITIES, SWEEP_MASSES, strict=True):
        # so many keys for every query, or all where there are fewer, are the density of a triangle
        width = 1 - math.sqrt(1 - density)
        kept, lines = max(2, blocks(width)), 64 * blocks(density / 2)
        moba = f"moba:chunk_size={length // 32},top_k={max(2, round(32 * width))}"
        texts += [
            f"draft:density={density},block_size=64,dense_len=0",
            f"draft:density={density},block_size=64,budget=row,dense_len=0",
            f"xattention:threshold={mass},stride=8,block_size=64,dense_len=0",
            f"minference:vertical_size={lines},slash_size={lines},dense_len=0",
            f"flexprefill:gamma={mass},min_budget={length // 16},block_size=64,dense_len=0",
            moba,
            f"{moba},force_first=true",
            f"infllm:top_k={kept},local_tokens={64 * max(1, kept // 4)},dense_len=0",
            f"streaming:window={round(length * width) - 5}",
        ]
    return [parse_spec(text) for text in texts]


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
