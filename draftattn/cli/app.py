"""The commands and their options."""

from __future__ import annotations

import typer

from draftattn.cli import options
from draftattn.cli.bench import bench_app
from draftattn.cli.calibrate import CALIBRATE_EXAMPLE, calibrate
from draftattn.cli.compare import compare
from draftattn.cli.doctor import doctor
from draftattn.cli.generate import generate
from draftattn.cli.llm import llm_app
from draftattn.cli.masks import masks
from draftattn.cli.metrics import metrics
from draftattn.cli.recall import recall
from draftattn.cli.report import report

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
app.command(
    epilog="Example: draftattn compare --model assets/tiny-wan --prompt-file prompts.txt --seeds 0,1 --height 256 "
    "--width 448 --frames 33 --steps 20 --sparsity 0.5,0.75,0.9 --selection row,head --output out/study"
)(options.interruptible(compare))
app.command(epilog="Example: draftattn metrics out/draft.mp4 out/dense.mp4")(options.interruptible(metrics))
app.command(
    epilog='Example: draftattn recall --model assets/tiny-wan --prompt "a dog" --height 256 --width 448 --frames 33 '
    "--steps 12 --sparsity 0.5,0.75,0.9 --selection row,head --output out/recall.json"
)(options.interruptible(recall))
app.command(epilog="Example: draftattn report out/study")(options.interruptible(report))
app.command(
    epilog='Example: draftattn masks --model assets/tiny-wan --prompt "hands moving red cups on a white table" '
    "--height 256 --width 448 --frames 33 --steps 12"
)(options.interruptible(masks))
app.command(epilog=CALIBRATE_EXAMPLE)(calibrate)
app.command()(doctor)
app.add_typer(bench_app, name="bench")
app.add_typer(llm_app, name="llm")


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from draftattn import __version__

        typer.echo(f"draftattn {__version__}")
        raise typer.Exit
