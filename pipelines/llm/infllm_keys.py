"""Means of overlapping windows of keys, which InfLLM v2 compares queries with, and how decoding keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

_SPARE = 64  # windows that a decoding text may add before what is kept moves


def compressed_keys(key: Tensor, stride: int) -> Tensor:
    """Means of windows of two strides, one every stride, of the keys that fill them: ``[B, M, H_kv, D]``.

    >>> compressed_keys(torch.arange(7.0).view(1, 7, 1, 1), 2).flatten().tolist()
    [1.5, 3.5]
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    whole = key.shape[1] // stride
    strides = key[:, : whole * stride].unflatten(1, (whole, stride)).mean(2, dtype=dtype)
    return (strides[:, :-1] + strides[:, 1:]) / 2


class CompressedWindows:
    """The compressed keys of a text that grows: a new key costs nothing until it fills a window.

    Args:
        stride: tokens from a window to the next.

    >>> windows = CompressedWindows(2)
    >>> key = torch.arange(7.0).view(1, 7, 1, 1)
    >>> windows.extend(key[:, :5]).flatten().tolist(), windows.extend(key).flatten().tolist()
    ([1.5], [1.5, 3.5])
    """

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.num_tokens = 0
        self._room: Tensor | None = None

    @torch.no_grad()
    def extend(self, key: Tensor) -> Tensor:
        """Takes all keys of a text, ``[B, K, H_kv, D]``, of which the first ``num_tokens`` are known already.

        Returns:
            `compressed_keys` of them in the keys' dtype, as a view of what is kept: to be read before the next call.
        """
        known, count = (max(0, length // self.stride - 1) for length in (self.num_tokens, key.shape[1]))
        if self._room is None or count > self._room.shape[1]:
            # an inference tensor could not be written to outside of inference mode
            with torch.inference_mode(False):
                shape = key.shape[0], count + _SPARE, *key.shape[2:]
                room = torch.empty(shape, dtype=key.dtype, device=key.device)
            if self._room is not None:
                room[:, :known] = self._room[:, :known]
            self._room = room
        if count > known:
            self._room[:, known:count] = compressed_keys(key[:, known * self.stride :], self.stride)
        self.num_tokens = key.shape[1]
        return self._room[:, :count]
