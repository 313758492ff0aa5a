"""``draftattn metrics``: how different two videos are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from draftattn.cli import options
from draftattn.errors import InputError

if TYPE_CHECKING:
    from draftattn.eval.frames import VideoFile

_FRAMES_PER_CHUNK = 16


def metrics(
    video: Annotated[Path, typer.Argument(help="The video to judge.")],
    reference: Annotated[Path, typer.Argument(help="The video it should equal.")],
    metric: Annotated[
        str | None, typer.Option(help="Only these, separated by commas: psnr, ssim, lpips, flicker.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON, every frame in it.")] = False,
) -> None:
    """Measure PSNR, SSIM, LPIPS and flicker of a video against another of the same size and length.

    Any file that ffmpeg reads will do. Encoding counts: for the cost of a setting alone use 'draftattn compare', which
    looks at frames before they are encoded.
    """
    from draftattn.eval.frames import open_video
    from draftattn.eval.metrics import METRICS, check_metrics, score_chunks
    from draftattn.eval.study import to_line

    names = list(METRICS) if metric is None else [name.strip() for name in metric.split(",") if name.strip()]
    if not names:
        raise InputError(f"metric is {metric!r}; choose from {', '.join(METRICS)}")
    with open_video(video) as first, open_video(reference) as second:
        _check_alike(first, second)
        checked = check_metrics(names, first.num_frames, first.height, first.width)
        with Console(stderr=True).status(f"measuring {first.num_frames} frames"):
            chunks = zip(first.chunks(_FRAMES_PER_CHUNK), second.chunks(_FRAMES_PER_CHUNK), strict=False)
            scores = score_chunks(_counted(chunks, first, second), checked, options.default_device())
    results = {name: score.to_json() for name, score in scores.items()}
    if json:
        size = {"num_frames": first.num_frames, "height": first.height, "width": first.width}
        sys.stdout.write(to_line({"video": str(video), "reference": str(reference), **size, **results}) + "\n")
        return
    table = Table("", "mean", "worst frame", "", title=f"{video} against {reference}", title_justify="left")
    for name, score in results.items():
        about = METRICS[name]
        shown = ["identical" if score[key] is None else f"{score[key]:.4g} {about.unit}" for key in ("mean", "worst")]
        better = "higher is better" if about.higher_is_better else "lower is better"
        table.add_row(about.title, shown[0], f"{shown[1]} (frame {score['worst_frame']})", better)
    Console().print(table)


def _check_alike(first: VideoFile, second: VideoFile) -> None:
    if _size(first) != _size(second):
        raise InputError(
            f"videos differ: {str(first.path)!r} has {_size(first)}, {str(second.path)!r} has {_size(second)}"
        )


def _size(video: VideoFile) -> str:
    return f"{video.num_frames} frames of {video.height}×{video.width}"


def _counted(chunks: Any, first: VideoFile, second: VideoFile) -> Any:
    """The chunks, refused where a video has other frames inside than its file says."""
    frames = 0
    for x, y in chunks:
        if len(x) != len(y):
            break
        frames += len(x)
        yield x, y
    if frames != first.num_frames:
        raise InputError(
            f"videos {str(first.path)!r} and {str(second.path)!r} cannot be compared whole: only {frames} of "
            f"{first.num_frames} frames can be decoded from both"
        )
