"""Turning keys and queries that already carry a rotary position to another position."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.rotary import turn_angles, turn_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHANGING_ROPE = ("dynamic", "longrope")  # frequencies that depend on the length of the text


class RotaryTurn:
    r"""Moves rotated keys or queries by a number of positions.

    Rotary position embedding (RoFormer, arXiv 2104.09864) turns the pair ``(x[i], x[i + r])`` at position ``p`` by the
    angle :math:`p\,\omega_i`. Turning it again by :math:`d\,\omega_i` gives the same key at position ``p + d``, also
    where frequencies are scaled (linear, llama3, yarn) or only the first ``2 r`` channels are rotated.

    Args:
        inv_freq: the frequencies, ``[r]``.
        scaling: factor by which the model's embedding makes keys longer besides (yarn); turning leaves their length.

    >>> turn = RotaryTurn(torch.tensor([1.0, 0.1]))
    >>> key = torch.randn(1, 3, 2, 8)  # [batch, tokens, heads, head_dim]
    >>> there_and_back = turn(turn(key, torch.tensor([[5]])), torch.tensor([[-5]]))
    >>> torch.allclose(there_and_back, key, atol=1e-5)
    True
    """

    def __init__(self, inv_freq: Tensor, scaling: float = 1.0) -> None:
        self.scaling = scaling
        frequencies = inv_freq.detach().double().cpu()
        self._frequencies = {frequencies.device: frequencies}  # a copy for every device, for moving them waits
        self._last: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None

    @property
    def half(self) -> int:
        """Pairs of channels that are turned, ``r``."""
        return len(self.frequencies(torch.device("cpu")))

    def __call__(self, x: Tensor, positions: Tensor | Sequence[int]) -> Tensor:
        """``x`` moved ahead by ``positions``.

        Args:
            x: ``[B, N, H, D]``.
            positions: int ``[B | 1, N | 1]``, or one int per batch item.

        Returns:
            A tensor like ``x``; the product is taken in float32 (float64 for float64).
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(positions, Tensor):
            cos, sin = turn_angles(positions.to(x.device)[..., None], self.frequencies(x.device), dtype)
        else:
            cos, sin = self.angles_of_items(positions, x.device, dtype)
        return turn_pairs(x, cos, sin)

    def frequencies(self, device: torch.device) -> Tensor:
        """The angles of one position, float64 ``[r]``."""
        if device not in self._frequencies:
            with torch.inference_mode(False):  # a kept inference tensor would break later autograd
                self._frequencies[device] = self._frequencies[torch.device("cpu")].to(device)
        return self._frequencies[device]

    def angles_of_items(
        self, positions: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine for one position per batch item, ``[B, 1, 1, r]``. The last ones are kept: layers share them.

        The host does not wait for the device.
        """
        wanted, last = (tuple(positions), device, dtype), self._last  # read once: models share it, also among threads
        if last is None or last[0] != wanted:
            with torch.inference_mode(False):
                there = torch.tensor(positions)[:, None, None].to(device, non_blocking=True)
                self._last = last = wanted, turn_angles(there, self.frequencies(device), dtype)
        return last[1]


def rotary_turn(model: PreTrainedModel) -> RotaryTurn:
    """The turn that fits a model's rotary embedding, tried on the model's own functions.

    Raises:
        InputError: if the model has no rotary embedding, several, or one whose angles are not linear in the position or
            whose channels are not paired by halves.
    """
    name = type(model).__name__
    embeddings = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if len(embeddings) != 1:
        raise InputError(f"{name} has {len(embeddings)} rotary embeddings; keys can be turned where there is one")
    rotary: Any = embeddings[0]
    kind = getattr(rotary, "rope_type", "default")
    if not isinstance(kind, str) or kind in _CHANGING_ROPE:
        raise InputError(f"rotary embedding {kind!r} of {name} changes with the length of the text; it must not")
    rotate = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise InputError(f"the rotary embedding of {name} is not one that keys can be turned by")
    turn = RotaryTurn(rotary.inv_freq, float(getattr(rotary, "attention_scaling", 1.0)))
    with torch.no_grad():
        probe = torch.linspace(0.5, 1.5, 2 * len(rotary.inv_freq), device=rotary.inv_freq.device)
        cos, sin = rotary(probe[None, None], torch.tensor([[3, 11]], device=probe.device))
        there = rotate(probe.expand(1, 1, 2, -1), probe.expand(1, 1, 2, -1), cos.float(), sin.float())[1]
        turned = turn(there[:, :, :1].transpose(1, 2), [8]).transpose(1, 2)
    if not torch.allclose(turned, there[:, :, 1:], atol=1e-4, rtol=1e-4):
        raise InputError(f"the rotary embedding of {name} does not turn pairs of halves linearly in the position")
    return turn
