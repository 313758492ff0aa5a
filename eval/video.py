"""Video files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v2 as imageio
from torch import Tensor

from draftattn.files import written_whole


def save_video(path: Path, video: Tensor, fps: float) -> None:
    """Encodes a video with H.264 at high quality; the file appears whole or not at all.

    Args:
        path: an ``.mp4`` file.
        video: ``[N, C, H, W]``, values in [0, 1]; any height and width.
        fps: frames per second.
    """
    frames = (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    with written_whole(path) as temporary:
        # macro_block_size=1: the default would rescale sizes that 16 does not divide
        writer: Any = imageio.get_writer(temporary, fps=fps, quality=8, macro_block_size=1, format="FFMPEG")  # type: ignore[arg-type]
        with writer:
            for frame in frames:
                writer.append_data(frame)
