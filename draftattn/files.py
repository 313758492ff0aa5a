"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from draftattn.errors import InputError


def check_writable(path: Path) -> None:
    """Checks that a file could be written, and makes its folder.

    Raises:
        InputError: if the folder cannot be made or written, or the path is a folder.
    """
    if path.is_dir():
        raise InputError(f"output {str(path)!r} is a folder; give a file name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {str(path)!r} cannot be written: {error.strerror} ({error.filename})") from error
    try:
        # permissions do not tell all: root may write nowhere in /proc
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"output {str(path)!r} cannot be written: {error.strerror}") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` that takes its place when the block ends, or vanishes if it fails."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
