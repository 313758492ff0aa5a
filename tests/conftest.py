"""Shared by all tests: Triton kernels run in Triton's interpreter where there is no GPU; tiny models."""

import contextlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when its kernels are defined, so it must stand before any import of them
    os.environ.setdefault("TRITON_INTERPRET", "1")

# first imported in a test that unsets the variable, Triton's own functions would be compiled ones for all that follow
with contextlib.suppress(ImportError):
    import triton  # noqa: F401


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The random video models of the pipeline tests (importlib mode puts no test folder on the path)."""
    path = Path(__file__).parent / "pipelines" / "video" / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("draftattn_tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
