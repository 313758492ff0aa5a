"""What a sink cache becomes once it is full: a ring, in which every new token takes the place of one that left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Ring:
    """Keys and values of sinks and window in one piece of memory that attention reads as it is.

    Softmax does not mind the order of keys. So a step copies one key and one value, and turns the sinks, whatever the
    length of the text and of the window; nothing is moved and no memory is asked for.

    Args:
        keys: ``[B, H_kv, S + W + 1, D]``: sinks, turned by the last step, and the last tokens, oldest at ``next``.
        values: like ``keys``.
        sinks: float32 ``[B, H_kv, S, 2, r]``, the keys of the sinks where they came, in the halves that are turned.
        partners: the same, with what every channel is turned with: minus the second half, and the first.
        next: where in the ring the next token goes.
    """

    keys: Tensor
    values: Tensor
    sinks: Tensor
    partners: Tensor
    next: int
    _turned: Tensor = field(init=False)

    def __post_init__(self) -> None:
        half = self.sinks.shape[4]
        # where in `keys` the turned halves go: a view, made once because every step wants it
        self._turned = self.keys[:, :, : self.sinks.shape[2], : 2 * half].unflatten(-1, (2, half))

    @classmethod
    def of(cls, sink_keys: Tensor, sink_values: Tensor, keys: Tensor, values: Tensor, half: int) -> Ring:
        """A ring of sinks ``[B, H_kv, S, D]``, not turned, and a window ``[B, H_kv, W, D]``; ``half`` is ``r``."""
        free = keys.new_empty(*keys.shape[:2], 1, keys.shape[3])
        sinks = sink_keys[..., : 2 * half].unflatten(-1, (2, half))
        sinks = sinks.to(torch.promote_types(keys.dtype, torch.float32))
        return cls(
            keys=torch.cat([sink_keys, keys, free], dim=2),
            values=torch.cat([sink_values, values, free], dim=2),
            sinks=sinks,
            partners=torch.stack([-sinks[..., 1, :], sinks[..., 0, :]], dim=-2),
            next=sink_keys.shape[2] + keys.shape[2],
        )

    @property
    def usable(self) -> bool:
        """Whether torch lets the ring be written to: never where gradients may be asked for."""
        return not torch.is_grad_enabled() and (torch.is_inference_mode_enabled() or not self.keys.is_inference())

    def step(self, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Takes one token, ``[B, H_kv, 1, D]``, and turns the sinks to where they stand for it.

        Args:
            key: of the token.
            value: of the token.
            cos: ``[B | 1, 1, 1, r]``, of the angles by which the sinks are turned.
            sin: like ``cos``.

        Returns:
            Keys and values ``[B, H_kv, S + W + 1, D]`` that the token sees, its own among them. They are the ring
            itself, which the next step changes.
        """
        self.keys.narrow(2, self.next, 1).copy_(key)
        self.values.narrow(2, self.next, 1).copy_(value)
        num_sinks = self.sinks.shape[2]
        if num_sinks:
            torch.addcmul(self.sinks * cos.unsqueeze(-2), self.partners, sin.unsqueeze(-2), out=self._turned)
        self.next = self.next + 1 if self.next + 1 < self.keys.shape[2] else num_sinks
        return self.keys, self.values

    def window(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the last ``W`` tokens, in order, as new tensors."""
        num_sinks = self.sinks.shape[2]
        keys, values = (
            torch.cat([x[:, :, self.next + 1 :], x[:, :, num_sinks : self.next]], dim=2)
            for x in (self.keys, self.values)
        )
        return keys, values

    def select(self, select: Callable[[Tensor], Tensor]) -> Ring:
        """A ring of some or all items in any order, as ``select`` picks them from a tensor ``[B, ...]``."""
        return Ring(select(self.keys), select(self.values), select(self.sinks), select(self.partners), self.next)
