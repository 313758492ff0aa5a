"""Structural similarity."""

from __future__ import annotations

import torch
from torch import Tensor

from draftattn.eval.metrics.pair import as_unit_pair, exact_convolutions

MIN_SIDE = 11


def ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each frame (Wang et al. 2004), by torchmetrics with its 11×11 Gaussian window.

    Args:
        video: ``[N, C, H, W]``, floating in [0, 1] or uint8, at least 11 pixels a side.
        reference: the same shape.

    Returns:
        float32 ``[N]``, 1 for identical frames.

    >>> import torch
    >>> ssim(torch.ones(2, 3, 16, 16), torch.ones(2, 3, 16, 16))
    tensor([1., 1.])
    """
    # torchmetrics takes seconds to import
    from torchmetrics.functional.image import structural_similarity_index_measure

    video, reference = as_unit_pair(video, reference)
    values = []
    with exact_convolutions():
        # a frame at a time: the windows of a whole video would fill tens of gigabytes
        for x, y in zip(video.split(1), reference.split(1), strict=True):
            value = structural_similarity_index_measure(x, y, data_range=1.0)
            assert isinstance(value, Tensor)
            values.append(value)
    return torch.stack(values)
