"""How different two videos are, frame by frame, on decoded frames."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio of each frame, :math:`-10 \log_{10} \overline{(x - y)^2}`.

    Args:
        video: ``[N, C, H, W]``, values in [0, 1].
        reference: the same shape.

    Returns:
        ``[N]`` in dB; infinite for identical frames.

    >>> import torch
    >>> psnr(torch.full((1, 3, 8, 8), 0.6), torch.full((1, 3, 8, 8), 0.5)).round(decimals=2)
    tensor([20.])
    """
    _check_pair(video, reference)
    errors = [(x.double() - y.double()).square().mean() for x, y in zip(video, reference, strict=True)]
    return -10 * torch.stack(errors).log10().float()


def ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each frame (Wang et al. 2004), by torchmetrics with its 11×11 Gaussian window.

    Args:
        video: ``[N, C, H, W]``, values in [0, 1], at least 11 pixels a side.
        reference: the same shape.

    Returns:
        ``[N]``, 1 for identical frames.

    >>> import torch
    >>> ssim(torch.ones(2, 3, 16, 16), torch.ones(2, 3, 16, 16))
    tensor([1., 1.])
    """
    _check_pair(video, reference)
    values = []
    # a frame at a time: the windows of a whole video would fill tens of gigabytes
    for x, y in zip(video.float().split(1), reference.float().split(1), strict=True):
        value = structural_similarity_index_measure(x, y, data_range=1.0)
        assert isinstance(value, Tensor)
        values.append(value)
    return torch.stack(values)


@dataclass(frozen=True)
class FrameScores:
    """A metric over the frames of a video.

    Args:
        per_frame: the value of each frame.
    """

    per_frame: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over frames."""
        return sum(self.per_frame) / len(self.per_frame)

    @property
    def worst(self) -> float:
        """The lowest frame."""
        return min(self.per_frame)

    def to_json(self) -> dict[str, object]:
        """Mean, worst frame and all frames, rounded; None stands for infinity, as JSON has none."""

        def finite(value: float) -> float | None:
            return round(value, 4) if math.isfinite(value) else None

        return {
            "mean": finite(self.mean),
            "worst": finite(self.worst),
            "worst_frame": self.per_frame.index(self.worst),
            "per_frame": [finite(value) for value in self.per_frame],
        }


def score_video(video: Tensor, reference: Tensor) -> dict[str, FrameScores]:
    """PSNR and SSIM of a video ``[N, C, H, W]`` in [0, 1] against a reference of the same shape."""
    return {
        "psnr": FrameScores(tuple(psnr(video, reference).tolist())),
        "ssim": FrameScores(tuple(ssim(video, reference).tolist())),
    }


def _check_pair(video: Tensor, reference: Tensor) -> None:
    if video.shape != reference.shape or video.ndim != 4:
        raise ValueError(
            f"videos must have one shape [frames, channels, height, width]; got {list(video.shape)} and "
            f"{list(reference.shape)}"
        )
