"""Tables of settings, on the screen, as Markdown or as JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from draftattn.errors import InputError
from draftattn.files import check_writable

Json = Annotated[bool, typer.Option("--json", help="One line of JSON for every result on stdout; the rest on stderr.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]


def wide_console(stderr: bool = False) -> Console:
    """The console; where it is none but a file or a pipe, wide enough for a table."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


def settings_table(names: list[str], headings: list[str], title: str, markdown: bool) -> tuple[Table, list[str]]:
    """An empty table with a row for every setting to come, and their short names.

    Args:
        names: settings.
        headings: of the columns after the first.
        title: above the table; what all settings share is added.
        markdown: whether it is to be Markdown, without a title.
    """
    short, shared = short_names(names)
    if shared:
        title = f"{title}\nAll settings: {shared}"
    table = Table(title=None if markdown else title, title_justify="left", box=box.MARKDOWN if markdown else box.SIMPLE)
    table.add_column("setting")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table, short


def short_names(names: list[str]) -> tuple[list[str], str]:
    """Names of settings without what all of them share, and what that is.

    >>> short_names(["sparsity0.5-warmup0-row", "sparsity0.5-warmup0.25-row"])
    (['warmup0', 'warmup0.25'], 'sparsity0.5 row')
    """
    parts = [name.split("-") for name in names]
    if len(parts) < 2:
        return names, ""
    shared = [part for part in parts[0] if all(part in other for other in parts)]
    return [" ".join(part for part in name if part not in shared) or "as all" for name in parts], " ".join(shared)


def shown(value: float) -> str:
    """A figure of a metric; infinity is that of identical videos."""
    return "identical" if math.isinf(value) else f"{value:.3g}"


def check_output(path: Path | None) -> None:
    """Checks that a JSON file can be written, if one is asked for.

    Raises:
        InputError: if not, or its name does not end in ``.json``.
    """
    if path is None:
        return
    if path.suffix != ".json":
        raise InputError(f"output is {str(path)!r}; it must end in .json")
    check_writable(path)
