"""Decoded frames: rounding them to 8 bits, keeping them without loss, reading them from any video."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.files import written_whole


def to_bytes(video: Tensor) -> Tensor:
    """Rounds a video in [0, 1] to the 8 bits that files and screens show; all metrics of a study look at these.

    >>> import torch
    >>> to_bytes(torch.tensor([0.0, 0.5, 1.2])).tolist()
    [0, 128, 255]
    """
    return video if video.dtype == torch.uint8 else (video.clamp(0, 1) * 255).round().byte()


def save_frames(path: Path, frames: Tensor, fps: float = 16) -> None:
    """Keeps frames without any loss (FFV1 in RGB); the file appears whole or not at all.

    Args:
        path: an ``.mkv`` file.
        frames: uint8 ``[N, 3, H, W]``.
        fps: for players; not used here.

    Raises:
        InputError: if the file could not be written whole, as on a full disk.
    """
    num_frames, _, height, width = frames.shape
    with written_whole(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (width, height),
            fps=fps,
            codec="ffv1",
            pix_fmt_in="rgb24",
            pix_fmt_out="bgr0",
            quality=None,
            macro_block_size=1,
            ffmpeg_log_level="error",
        )
        reason = "is the disk full?"
        try:
            writer.send(None)
            for frame in frames:
                writer.send(np.ascontiguousarray(frame.permute(1, 2, 0).cpu().numpy()))
        except OSError as error:
            reason = str(error).strip().splitlines()[-1]
        finally:
            writer.close()
        if _count(temporary) != num_frames:
            raise InputError(f"frames {str(path)!r} could not be written whole: {reason}")


def load_frames(path: Path) -> Tensor:
    """Frames of a video file, uint8 ``[N, 3, H, W]``: exactly those that `save_frames` kept.

    Raises:
        InputError: see `open_video`.
    """
    with open_video(path) as video:
        return torch.cat(list(video.chunks(16)))


@dataclass
class VideoFile:
    """A video being read.

    Args:
        path: the file.
        height: pixels.
        width: pixels.
        num_frames: frames, as the file says.
        fps: frames per second, as the file says.
        decoder: gives the bytes of each frame.
    """

    path: Path
    height: int
    width: int
    num_frames: int
    fps: float
    decoder: Iterator[bytes]

    def chunks(self, size: int) -> Iterator[Tensor]:
        """The frames in order, uint8 ``[<= size, 3, H, W]`` at a time.

        Raises:
            InputError: if a frame cannot be decoded.
        """
        frames: list[Tensor] = []
        try:
            for data in self.decoder:
                frame = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(self.height, self.width, 3)
                frames.append(frame.permute(2, 0, 1))
                if len(frames) == size:
                    yield torch.stack(frames)
                    frames = []
        except (OSError, RuntimeError) as error:
            raise _unreadable(self.path, error) from error
        if frames:
            yield torch.stack(frames)


@contextmanager
def open_video(path: Path) -> Iterator[VideoFile]:
    """Opens any video that ffmpeg reads, as 8-bit RGB, every frame once whatever its time stamp.

    Raises:
        InputError: if there is no such file, it is no video, or there is no ffmpeg.
    """
    if not path.is_file():
        raise InputError(f"video {str(path)!r} is not a file")
    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise InputError(f"video {str(path)!r} cannot be read without ffmpeg: install imageio-ffmpeg") from error
    num_frames = _count(path)
    decoder = imageio_ffmpeg.read_frames(str(path), output_params=["-fps_mode", "passthrough"])
    try:
        try:
            header: dict[str, Any] = next(decoder)
        except (OSError, RuntimeError, StopIteration) as error:
            raise _unreadable(path, error) from error
        width, height = header["size"]
        if num_frames == 0 or width == 0 or height == 0:
            raise InputError(f"video {str(path)!r} cannot be read: it has no frames")
        yield VideoFile(path, height, width, num_frames, header["fps"], decoder)
    finally:
        decoder.close()


def _count(path: Path) -> int:
    try:
        return imageio_ffmpeg.count_frames_and_secs(str(path))[0]
    except RuntimeError:
        return 0


def _unreadable(path: Path, error: BaseException) -> InputError:
    # the last line of ffmpeg's output is the reason, those before are its banner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return InputError(f"video {str(path)!r} cannot be read: {lines[-1] if lines else 'it is no video'}")
