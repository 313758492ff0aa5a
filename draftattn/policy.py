"""What a mask policy is, and where in a generation it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask


@dataclass(frozen=True)
class CallContext:
    """Where in a generation an attention call stands.

    Args:
        layer: number of the attention layer in its transformer.
        step: denoising step, from 0; None outside a denoising loop.
        num_steps: steps of the run; None outside a denoising loop.
        branch: guidance branch, such as ``"cond"`` or ``"uncond"``; None where it is not known.
        run: an object that is another one for every generation; None outside of one. A policy that remembers
            something from step to step starts anew when it changes.
    """

    layer: int = 0
    step: int | None = None
    num_steps: int | None = None
    branch: str | None = None
    run: object = None


class MaskPolicy(Protocol):
    """Anything that chooses blocks for an attention call."""

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        """The block mask of one call, made on its device without a host sync."""
        ...


@runtime_checkable
class ObservingPolicy(MaskPolicy, Protocol):
    """A policy that also looks at the calls which stay dense, such as those of warm-up steps."""

    def observe(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> None:
        """Looks at a dense call of a layer that will be sparse in other steps."""
        ...
