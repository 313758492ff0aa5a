"""How a command shows the package's own warnings: as sentences, not as lines of code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from draftattn.errors import DraftAttentionWarning


@contextmanager
def spoken_warnings() -> Iterator[None]:
    """Within it, a `DraftAttentionWarning` is one line ``draftattn: <message>`` on stderr, once each.

    Other warnings appear as they always do, and filters such as ``python -W`` apply to all.
    """
    said: set[str] = set()
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, DraftAttentionWarning):
                usual(message, category, *where, **more)
            elif str(message) not in said:
                said.add(str(message))
                typer.echo(f"draftattn: {message}", err=True)

        warnings.showwarning = show
        yield
