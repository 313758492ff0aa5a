"""Fixtures for the pages: a study to report on, and a browser to open it in."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent


def load(name: str, path: Path) -> ModuleType:
    """A module beside the tests (importlib mode puts no test folder on the path)."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """Random video models of a few thousand parameters."""
    return load("draftattn_tiny_models", HERE.parents[1] / "pipelines" / "video" / "tiny_models.py")


@pytest.fixture(scope="session")
def make_study() -> Callable[..., dict[str, Any]]:
    """Writes a small study with random figures into a folder."""
    return load("draftattn_small_study", HERE / "small_study.py").make_study


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for all tests; without one they are skipped, but not in CI."""
    module = load("draftattn_chromium", HERE / "chromium.py")
    executable = module.find_chromium()
    if executable is None:
        reason = "no Chromium found: install it (Debian: apt-get install chromium) or set CHROMIUM to its path"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    browser = module.Chromium(executable, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
