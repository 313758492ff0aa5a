"""Learned perceptual image patch similarity, on AlexNet."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from draftattn.eval.metrics.pair import as_unit_pair, exact_convolutions

WEIGHTS = Path(__file__).parent / "weights" / "lpips-alexnet.safetensors"
# Below this nothing is left for the second pooling.
MIN_SIDE = 31

# Mean and standard deviation of ImageNet, for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

# Number of the convolution in torchvision's AlexNet, its stride and padding, and whether pooling comes before it.
_LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))

# Largest batch of pixels, which bounds the memory of features to some hundred megabytes.
_PIXELS_PER_BATCH = 4_000_000


def lpips(video: Tensor, reference: Tensor) -> Tensor:
    r"""Distance of each frame in the features of AlexNet, weighted as people judge (LPIPS 0.1, arXiv 1801.03924).

    :math:`\sum_l \overline{w_l^\top (\hat x_l - \hat y_l)^2}` over five layers, with :math:`\hat x_l` the features of
    a pixel scaled to length 1, :math:`w_l` the published heads and the mean over pixels. The weights come with the
    package.

    Args:
        video: ``[N, 3, H, W]``, floating in [0, 1] or uint8, at least 31 pixels a side.
        reference: the same shape.

    Returns:
        float32 ``[N]``: 0 for identical frames; the larger the more different.

    Raises:
        ValueError: if the frames are smaller, or not RGB.

    >>> import torch
    >>> lpips(torch.ones(2, 3, 64, 64), torch.ones(2, 3, 64, 64))
    tensor([0., 0.])
    """
    video, reference = as_unit_pair(video, reference)
    channels, height, width = video.shape[1:]
    if channels != 3 or min(height, width) < MIN_SIDE:
        raise ValueError(f"LPIPS needs 3 channels and at least {MIN_SIDE} pixels a side; got {list(video.shape)}")
    weights = load_weights(video.device)
    count = max(1, _PIXELS_PER_BATCH // (height * width))
    with torch.no_grad(), exact_convolutions():
        values = [
            weighted_distance(x, y, weights) for x, y in zip(video.split(count), reference.split(count), strict=True)
        ]
    return torch.cat(values)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a cached inference tensor would break later autograd
def load_weights(device: torch.device) -> dict[str, Tensor]:
    """Weights of AlexNet and of the published heads, float32, kept per device."""
    from safetensors.torch import load_file

    return {name: weight.to(device, torch.float32) for name, weight in load_file(WEIGHTS).items()}


def weighted_distance(video: Tensor, reference: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """What `lpips` returns, for float frames in [0, 1] in one batch and with gradients."""
    shift, scale = (video.new_tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
    x = (2 * torch.cat([video, reference]) - 1 - shift) / scale
    total = video.new_zeros(len(video))
    for head, (layer, stride, padding, pooled) in enumerate(_LAYERS):
        if pooled:
            x = F.max_pool2d(x, kernel_size=3, stride=2)
        weight, bias = (weights[f"features.{layer}.{part}"] for part in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, stride, padding).relu_()
        unit = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
        difference = (unit[: len(video)] - unit[len(video) :]).square()
        total += torch.einsum("nchw,c->n", difference, weights[f"heads.{head}.weight"]) / difference[0, 0].numel()
    return total
