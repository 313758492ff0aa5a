"""Prompts: from a text file, or those of a VBench dimension."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from draftattn.errors import InputError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are skipped and repeated prompts kept once.

    Raises:
        InputError: if the file cannot be read or holds no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt file {str(path)!r} cannot be read: {error}") from error
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise InputError(f"prompt file {str(path)!r} holds no prompt; write one a line")
    return prompts


def vbench_prompts(dimension: str) -> list[str]:
    """The prompts of a VBench dimension (arXiv 2311.17982), such as ``temporal_flickering``.

    They are read from the ``vbench`` package without importing it, so none of its dependencies is needed.

    Raises:
        InputError: if the package is not installed, or has no such dimension.
    """
    spec = importlib.util.find_spec("vbench")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders if (file := Path(folder, "VBench_full_info.json")).is_file()]
    if not files:
        raise InputError(
            f"vbench is {dimension!r}, but the vbench package is not installed; get its prompts with "
            "'pip install --no-deps vbench'"
        )
    entries = json.loads(files[0].read_text(encoding="utf-8"))
    dimensions = sorted({name for entry in entries for name in entry["dimension"]})
    if dimension not in dimensions:
        raise InputError(f"vbench is {dimension!r}; choose from {', '.join(dimensions)}")
    return list(dict.fromkeys(entry["prompt_en"] for entry in entries if dimension in entry["dimension"]))
