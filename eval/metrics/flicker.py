"""How differently two videos change from frame to frame."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.eval.metrics.pair import as_unit_pair

MIN_FRAMES = 2


def flicker(video: Tensor, reference: Tensor) -> Tensor:
    r"""Difference of the frame-to-frame differences of two videos, in grey levels of 255.

    :math:`f_t = 255 \; \overline{|(x_t - x_{t-1}) - (y_t - y_{t-1})|}`, the mean over channels and pixels, for
    :math:`t \ge 1`. What both videos do at the same moment (motion, cuts, flicker of the reference itself) cancels,
    and so does an error that stands still; what one of them adds from one frame to the next stays.

    Args:
        video: ``[N, C, H, W]``, floating in [0, 1] or uint8, at least 2 frames.
        reference: the same shape.

    Returns:
        float32 ``[N]``. The first frame has none before it: its value is NaN.

    >>> import torch
    >>> still = torch.full((3, 3, 8, 8), 0.5)
    >>> blink = still + torch.tensor([0.0, 0.1, 0.0]).view(3, 1, 1, 1)
    >>> flicker(blink, still).round(decimals=2)
    tensor([    nan, 25.5000, 25.5000])
    """
    video, reference = as_unit_pair(video, reference)
    # a frame at a time: memory stays that of a frame
    values = [video.new_tensor(torch.nan)]
    error = video[0] - reference[0]
    for x, y in zip(video[1:], reference[1:], strict=True):
        next_error = x - y
        values.append(255 * (next_error - error).abs().mean())
        error = next_error
    return torch.stack(values)
