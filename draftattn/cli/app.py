"""The commands and their options."""

from __future__ import annotations

import typer

from draftattn.cli import options
from draftattn.cli.bench import bench_app
from draftattn.cli.doctor import doctor
from draftattn.cli.generate import generate

app = typer.Typer(
    name="draftattn",
    help="Video diffusion several times faster: attention only where a low-resolution draft says it matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(
    epilog='Example: draftattn generate --model assets/tiny-wan --prompt "hands moving red cups on a white table" '
    "--height 256 --width 448 --frames 33 --steps 12 --against-dense"
)(options.interruptible(generate))
app.command()(doctor)
app.add_typer(bench_app, name="bench")


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from draftattn import __version__

        typer.echo(f"draftattn {__version__}")
        raise typer.Exit
