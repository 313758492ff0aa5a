"""What a policy remembers from step to step, and randomness that is the same in every run."""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

import torch

from draftattn.inputs import AttentionInputs
from draftattn.policy import CallContext

T = TypeVar("T")


class Remembered(NamedTuple, Generic[T]):
    """What was found, and in which step."""

    value: T
    step: int


class Memory(Generic[T]):
    """Keeps a value for every layer and guidance branch of a run and forgets all when another run begins.

    Nothing is kept where the denoising step is not known: there is no telling runs apart.
    """

    def __init__(self) -> None:
        self._run: object = None
        self._values: dict[Hashable, Remembered[T]] = {}

    def recall(self, inputs: AttentionInputs, context: CallContext) -> Remembered[T] | None:
        """What was kept of this layer and branch in an earlier step, or in this one."""
        self._forget_other_runs(context)
        if context.step is None:
            return None
        found = self._values.get(self._key(inputs, context))
        # without a run object a step that lies before tells a new run
        return None if found is None or found.step > context.step else found

    def keep(self, inputs: AttentionInputs, context: CallContext, value: T) -> None:
        """Keeps a value found in this call."""
        self._forget_other_runs(context)
        if context.step is not None:
            self._values[self._key(inputs, context)] = Remembered(value, context.step)

    def _forget_other_runs(self, context: CallContext) -> None:
        if context.run is not self._run:
            self._values.clear()
            self._run = context.run

    @staticmethod
    def _key(inputs: AttentionInputs, context: CallContext) -> Hashable:
        return context.layer, context.branch, inputs.layout, inputs.query.shape[0]


def call_generator(context: CallContext, device: torch.device, seed: int = 0) -> torch.Generator:
    """A generator of its own for each layer, step and branch, the same in every run."""
    place = f"{seed} {context.layer} {context.step} {context.branch}"
    return torch.Generator(device).manual_seed(zlib.crc32(place.encode()))
