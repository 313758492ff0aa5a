"""All metrics over the frames of two videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.eval.metrics.flicker import MIN_FRAMES, flicker
from draftattn.eval.metrics.lpips import MIN_SIDE as LPIPS_MIN_SIDE
from draftattn.eval.metrics.lpips import lpips
from draftattn.eval.metrics.psnr import psnr
from draftattn.eval.metrics.ssim import MIN_SIDE as SSIM_MIN_SIDE
from draftattn.eval.metrics.ssim import ssim

MetricName = Literal["psnr", "ssim", "lpips", "flicker"]

_FRAMES_PER_CHUNK = 16


@dataclass(frozen=True)
class Metric:
    """A metric of two videos.

    Args:
        function: ``(video, reference) -> [N]``; NaN where a frame has no value.
        title: what a table calls it.
        unit: its unit, empty if it has none.
        higher_is_better: what it says about quality.
        min_side: fewest pixels a side.
        min_frames: fewest frames.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    title: str
    unit: str
    higher_is_better: bool
    min_side: int = 1
    min_frames: int = 1

    def reason_against(self, num_frames: int, height: int, width: int) -> str | None:
        """Why the metric has no meaning for a size, None if it has."""
        if num_frames < self.min_frames:
            return f"{self.title} needs at least {self.min_frames} frames; the video has {num_frames}"
        if min(height, width) < self.min_side:
            return f"{self.title} needs at least {self.min_side} pixels a side; the video has {height}×{width}"
        return None


METRICS: dict[MetricName, Metric] = {
    "psnr": Metric(psnr, "PSNR", "dB", higher_is_better=True),
    "ssim": Metric(ssim, "SSIM", "", higher_is_better=True, min_side=SSIM_MIN_SIDE),
    "lpips": Metric(lpips, "LPIPS", "", higher_is_better=False, min_side=LPIPS_MIN_SIDE),
    "flicker": Metric(flicker, "flicker", "of 255", higher_is_better=False, min_frames=MIN_FRAMES),
}


@dataclass(frozen=True)
class FrameScores:
    """A metric over the frames of a video.

    Args:
        per_frame: the value of each frame; NaN where a frame has none (flicker of the first).
        higher_is_better: what the metric says about quality.

    >>> scores = FrameScores((30.0, 20.0, 25.0))
    >>> scores.mean, scores.worst, scores.worst_frame
    (25.0, 20.0, 1)
    """

    per_frame: tuple[float, ...]
    higher_is_better: bool = True

    @property
    def mean(self) -> float:
        """Mean over the frames that have a value."""
        values = [value for value in self.per_frame if not math.isnan(value)]
        return sum(values) / len(values)

    @property
    def worst(self) -> float:
        """The value of the worst frame."""
        return self.per_frame[self.worst_frame]

    @property
    def worst_frame(self) -> int:
        """Number of the worst frame, the first of equals."""
        frames = [frame for frame, value in enumerate(self.per_frame) if not math.isnan(value)]
        choose = min if self.higher_is_better else max
        return choose(frames, key=lambda frame: self.per_frame[frame])

    def to_json(self) -> dict[str, Any]:
        """Mean, worst frame and all frames, rounded; None stands for infinity and for no value, as JSON has neither."""

        def finite(value: float) -> float | None:
            return round(value, 5) if math.isfinite(value) else None

        return {
            "mean": finite(self.mean),
            "worst": finite(self.worst),
            "worst_frame": self.worst_frame,
            "per_frame": [finite(value) for value in self.per_frame],
        }


def check_metrics(names: Iterable[str], num_frames: int, height: int, width: int) -> list[MetricName]:
    """Checks that metrics exist and have a meaning for a video size.

    Raises:
        InputError: if one does not; names it and what it needs.

    >>> check_metrics(["psnr"], num_frames=1, height=8, width=8)
    ['psnr']
    """
    checked: list[MetricName] = []
    for name in names:
        if name not in get_args(MetricName):
            raise InputError(f"metric is {name!r}; choose from {', '.join(get_args(MetricName))}")
        reason = METRICS[name].reason_against(num_frames, height, width)  # type: ignore[index]
        if reason is not None:
            raise InputError(reason)
        checked.append(name)  # type: ignore[arg-type]
    return checked


def applicable_metrics(num_frames: int, height: int, width: int) -> list[MetricName]:
    """The metrics that have a meaning for a video size.

    >>> applicable_metrics(1, 64, 64)
    ['psnr', 'ssim', 'lpips']
    """
    return [name for name, metric in METRICS.items() if metric.reason_against(num_frames, height, width) is None]


def score_video(
    video: Tensor,
    reference: Tensor,
    metrics: Sequence[MetricName] | None = None,
    device: torch.device | None = None,
) -> dict[MetricName, FrameScores]:
    """Scores of a video against a reference of the same shape.

    Args:
        video: ``[N, 3, H, W]``, floating in [0, 1] or uint8.
        reference: the same shape.
        metrics: which ones; None for all that have a meaning for the size.
        device: where to compute, some frames at a time; None for where the videos are.

    >>> import torch
    >>> video = torch.rand(3, 3, 64, 64)
    >>> {name: scores.mean for name, scores in score_video(video, video).items()}
    {'psnr': inf, 'ssim': 1.0, 'lpips': 0.0, 'flicker': 0.0}
    """
    if video.shape != reference.shape or video.ndim != 4:
        raise ValueError(
            f"videos must have one shape [frames, channels, height, width]; got {list(video.shape)} and "
            f"{list(reference.shape)}"
        )
    num_frames, _, height, width = video.shape
    if metrics is None:
        metrics = applicable_metrics(num_frames, height, width)
    else:
        check_metrics(metrics, num_frames, height, width)
    chunks = zip(video.split(_FRAMES_PER_CHUNK), reference.split(_FRAMES_PER_CHUNK), strict=True)
    return score_chunks(chunks, metrics, device)


def score_chunks(
    chunks: Iterable[tuple[Tensor, Tensor]], metrics: Sequence[MetricName], device: torch.device | None = None
) -> dict[MetricName, FrameScores]:
    """Scores of two videos that arrive in chunks of frames, so that long ones need not fit into memory.

    Args:
        chunks: pairs of ``[n, 3, H, W]`` in order, see `score_video`.
        metrics: which ones.
        device: where to compute; None for where the chunks are.
    """
    values: dict[MetricName, list[Tensor]] = {name: [] for name in metrics}
    for overlap, (video, reference) in _overlapping(chunks):
        if device is not None:
            video, reference = video.to(device), reference.to(device)
        for name in metrics:
            if name == "flicker":
                values[name].append(flicker(video, reference)[overlap:].cpu())
            else:
                values[name].append(METRICS[name].function(video[overlap:], reference[overlap:]).cpu())
    return {
        name: FrameScores(tuple(torch.cat(parts).tolist()), METRICS[name].higher_is_better)
        for name, parts in values.items()
    }


def _overlapping(
    chunks: Iterable[tuple[Tensor, Tensor]],
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Puts the last frame of the chunk before in front of each chunk; says how many frames that are."""
    last: tuple[Tensor, Tensor] | None = None
    for video, reference in chunks:
        if last is None:
            yield 0, (video, reference)
        else:
            yield 1, (torch.cat([last[0], video]), torch.cat([last[1], reference]))
        last = video[-1:], reference[-1:]
