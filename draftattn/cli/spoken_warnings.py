"""How a command shows the package's own warnings: as sentences, not as lines of code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

_MACHINERY = ("warnings", "_py_warnings")  # what runs between who warns and what shows it; its name differs by version


@contextmanager
def spoken_warnings() -> Iterator[None]:
    """Within it, a `UserWarning` of this package is one line ``draftattn: <message>`` on stderr, once each.

    Warnings of other packages appear as they always do, and filters such as ``python -W`` apply to all.
    """
    said: set[str] = set()
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, UserWarning) or not _is_ours(sys._getframe(1)):
                usual(message, category, *where, **more)
            elif str(message) not in said:
                said.add(str(message))
                typer.echo(f"draftattn: {message}", err=True)

        warnings.showwarning = show
        yield


def _is_ours(frame: FrameType | None) -> bool:
    """Whether code of this package warns. The place that a warning names does not tell: it may be a caller's."""
    while frame is not None and frame.f_globals.get("__name__") in _MACHINERY:
        frame = frame.f_back
    module = "" if frame is None else str(frame.f_globals.get("__name__"))
    return module.partition(".")[0] == __name__.partition(".")[0]
