"""``draftattn report``: the page of a study, written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a study, made by 'draftattn compare'; may be unfinished.")],
    embed: Annotated[
        float, typer.Option(help="Megabytes of videos to put inside the page; the others are read from beside it.")
    ] = 32,
) -> None:
    """Write report.html into the folder of a study: one page that opens from disk, with everything inside it."""
    from draftattn.eval.report import write_report

    page = write_report(folder, embed_megabytes=embed)
    typer.echo(f"Wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")
