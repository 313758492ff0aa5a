"""Peak signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.eval.metrics.pair import as_unit_pair


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio of each frame, :math:`-10 \log_{10} \overline{(x - y)^2}`.

    Args:
        video: ``[N, C, H, W]``, floating in [0, 1] or uint8.
        reference: the same shape.

    Returns:
        float32 ``[N]`` in dB; infinite for identical frames.

    >>> import torch
    >>> psnr(torch.full((1, 3, 8, 8), 0.6), torch.full((1, 3, 8, 8), 0.5)).round(decimals=2)
    tensor([20.])
    """
    video, reference = as_unit_pair(video, reference)
    # a frame at a time: float64 copies of a whole video would be large
    errors = [(x.double() - y.double()).square().mean() for x, y in zip(video, reference, strict=True)]
    return -10 * torch.stack(errors).log10().float()
