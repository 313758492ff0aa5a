"""Fixtures for everything that plugs into a model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module `tiny_models` beside the tests (importlib mode puts no test folder on the path)."""
    path = Path(__file__).parent / "video" / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("draftattn_tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
