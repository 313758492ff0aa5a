"""Shared by all tests: Triton kernels run in Triton's interpreter where there is no GPU."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    # Triton reads this when its kernels are defined, so it must stand before any import of them
    os.environ.setdefault("TRITON_INTERPRET", "1")

# first imported in a test that unsets the variable, Triton's own functions would be compiled ones for all that follow
with contextlib.suppress(ImportError):
    import triton  # noqa: F401
