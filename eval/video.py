"""Video files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import imageio_ffmpeg
from torch import Tensor

from draftattn.errors import InputError
from draftattn.files import written_whole


def save_video(path: Path, video: Tensor, fps: float) -> None:
    """Encodes a video with H.264 at high quality; the file appears whole or not at all.

    Args:
        path: an ``.mp4`` file.
        video: ``[N, C, H, W]``, values in [0, 1]; any height and width.
        fps: frames per second.

    Raises:
        InputError: if the file could not be written whole, as on a full disk.
    """
    frames = (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    with written_whole(path) as temporary:
        # macro_block_size=1: the default would rescale sizes that 16 does not divide
        writer: Any = imageio.get_writer(temporary, fps=fps, quality=8, macro_block_size=1, format="FFMPEG")  # type: ignore[arg-type]
        with writer:
            for frame in frames:
                writer.append_data(frame)
        _check_whole(temporary, path, len(frames))


def _check_whole(temporary: Path, path: Path, num_frames: int) -> None:
    # imageio does not look at ffmpeg's exit status
    try:
        written = imageio_ffmpeg.count_frames_and_secs(str(temporary))[0]
    except RuntimeError:
        written = 0
    if written != num_frames:
        raise InputError(
            f"video {str(path)!r} could not be written whole ({written} of {num_frames} frames): is the disk full?"
        )
