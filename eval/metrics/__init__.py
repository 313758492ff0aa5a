"""How different two videos are, frame by frame: one metric a file."""

from __future__ import annotations

from draftattn.eval.metrics.flicker import flicker
from draftattn.eval.metrics.lpips import lpips
from draftattn.eval.metrics.psnr import psnr
from draftattn.eval.metrics.scores import (
    METRICS,
    FrameScores,
    MetricName,
    applicable_metrics,
    check_metrics,
    score_chunks,
    score_video,
)
from draftattn.eval.metrics.ssim import ssim

__all__ = [
    "METRICS",
    "FrameScores",
    "MetricName",
    "applicable_metrics",
    "check_metrics",
    "flicker",
    "lpips",
    "psnr",
    "score_chunks",
    "score_video",
    "ssim",
]
