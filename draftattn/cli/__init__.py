"""The command ``draftattn``."""

from __future__ import annotations

import sys

from draftattn.errors import InputError


def main() -> None:
    """Runs the command line. Bad input ends it with one sentence and exit code 2."""
    from draftattn.cli.app import app

    try:
        app()
    except InputError as error:
        print(f"draftattn: {error}", file=sys.stderr)
        sys.exit(2)
