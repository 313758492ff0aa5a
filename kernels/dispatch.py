"""Which tensors Triton kernels serve."""

from __future__ import annotations

import importlib.util

from torch import Tensor

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_serves(x: Tensor) -> bool:
    """Whether Triton's kernels run on a tensor's device; ``torch.compile`` can trace it."""
    return x.is_cuda and _TRITON_INSTALLED
