import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["loop", "text"])
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(f"examples.tiny_wan.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
