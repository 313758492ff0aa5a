"""Clips of a folder as tensors, and the windows of them that are learnt or held out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from draftattn.errors import InputError

from .recipe import VideoRecipe

CAPTIONS = Path(__file__).with_name("clips.json")


@dataclass(frozen=True)
class Scene:
    """A stretch of a clip with one caption; ``start`` and ``end`` in seconds, an ``end`` of None is the clip's."""

    file: str
    caption: str
    start: float = 0.0
    end: float | None = None
    held_out: bool = False


@dataclass(frozen=True)
class Shot:
    """The decoded frames of a scene.

    Args:
        scene: where they come from.
        frames: uint8 ``[num_frames, 3, height, width]``.
        stride: frames to go on between two frames of a window.
    """

    scene: Scene
    frames: Tensor
    stride: int


@dataclass(frozen=True)
class Window:
    """A cut through a shot: first frame, and the crop as ``(top, left, height, width)`` in its pixels."""

    shot: int
    start: int
    crop: tuple[int, int, int, int]


def read_scenes(path: Path = CAPTIONS) -> list[Scene]:
    """Scenes of a caption file.

    Raises:
        InputError: if the file is no list of clips with scenes.
    """
    try:
        content = json.loads(path.read_text())
        return [Scene(clip["file"], **scene) for clip in content["clips"] for scene in clip["scenes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"captions {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error


def read_shots(folder: Path, scenes: list[Scene], video: VideoRecipe, device: torch.device) -> list[Shot]:
    """Decodes the clips of all scenes at once, each with an ffmpeg process of its own.

    Frames are cropped to the windows' aspect ratio around the centre and scaled to ``video.decoded_size``.

    Raises:
        InputError: if a clip is missing or unreadable, or a scene is too short for a window.
    """
    files = sorted({scene.file for scene in scenes})
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"clip {file!r} is not in {str(folder)!r}")
    with ThreadPoolExecutor(max_workers=max(1, len(files))) as pool:
        clips = dict(zip(files, pool.map(lambda file: _decode(folder / file, video), files), strict=True))
    shots = []
    for scene in scenes:
        frames, rate = clips[scene.file]
        first = round(scene.start * rate)
        last = len(frames) if scene.end is None else min(len(frames), round(scene.end * rate))
        stride = max(1, round(rate / video.frame_rate))
        # a few starts at least; otherwise each frame counts
        while stride > 1 and last - first < (video.num_frames - 1) * stride + 1:
            stride -= 1
        if last - first < (video.num_frames - 1) * stride + 1:
            raise InputError(
                f"a scene needs at least {video.num_frames} frames; {scene.file!r} has {max(0, last - first)} between "
                f"{scene.start} s and {'its end' if scene.end is None else f'{scene.end} s'}"
            )
        shots.append(Shot(scene, frames[first:last].to(device), stride))
    return shots


def _decode(path: Path, video: VideoRecipe) -> tuple[Tensor, float]:
    height, width = video.decoded_size
    ratio = width / height
    crop = f"crop='min(iw,ih*{ratio:.6f})':'min(ih,iw/{ratio:.6f})'"
    reader: Iterator[Any] = imageio_ffmpeg.read_frames(
        str(path), output_params=["-vf", f"{crop},scale={width}:{height}:flags=area"]
    )
    try:
        rate = float(next(reader)["fps"])
        frames = [torch.frombuffer(bytearray(frame), dtype=torch.uint8) for frame in reader]
        pixels = torch.stack(frames).view(-1, height, width, 3)
    except (OSError, RuntimeError, StopIteration, KeyError) as error:
        raise InputError(f"clip {str(path)!r} cannot be decoded: {type(error).__name__}") from error
    return pixels.permute(0, 3, 1, 2).contiguous(), rate


def draw_windows(shots: Sequence[Shot], video: VideoRecipe, generator: torch.Generator) -> list[Window]:
    """Windows of the shots that are learnt: as many for every caption, starts spread evenly, crops drawn."""
    chosen = [index for index, shot in enumerate(shots) if not shot.scene.held_out]
    windows = []
    for caption in dict.fromkeys(shots[index].scene.caption for index in chosen):
        same = [index for index in chosen if shots[index].scene.caption == caption]
        places = [(index, start) for index in same for start in range(_starts(shots[index], video))]
        for count in range(video.windows_per_caption):
            index, start = places[count * len(places) // video.windows_per_caption]
            windows.append(Window(index, start, _draw_crop(video, generator)))
    return windows


def held_out_windows(shots: Sequence[Shot], video: VideoRecipe, per_shot: int) -> list[Window]:
    """Whole windows of the shots held out, spread evenly, without randomness."""
    return [
        Window(index, start, (0, 0, *video.decoded_size))
        for index, shot in enumerate(shots)
        if shot.scene.held_out
        for start in _spread(_starts(shot, video), per_shot)
    ]


def learnt_windows(shots: Sequence[Shot], video: VideoRecipe) -> list[Window]:
    """One whole window in the middle of the first shot of each caption that is learnt."""
    first: dict[str, int] = {}
    for index, shot in enumerate(shots):
        if not shot.scene.held_out:
            first.setdefault(shot.scene.caption, index)
    return [Window(i, _starts(shots[i], video) // 2, (0, 0, *video.decoded_size)) for i in first.values()]


def cut(shot: Shot, window: Window, video: VideoRecipe) -> Tensor:
    """The window as float32 ``[3, num_frames, height, width]`` in [-1, 1]."""
    top, left, height, width = window.crop
    last = window.start + (video.num_frames - 1) * shot.stride + 1
    frames = shot.frames[window.start : last : shot.stride, :, top : top + height, left : left + width].float()
    if (height, width) != (video.height, video.width):
        frames = F.interpolate(frames, (video.height, video.width), mode="bilinear", antialias=True)
    return (frames / 127.5 - 1).clamp(-1, 1).permute(1, 0, 2, 3)


def _starts(shot: Shot, video: VideoRecipe) -> int:
    return len(shot.frames) - (video.num_frames - 1) * shot.stride


def _spread(length: int, count: int) -> list[int]:
    return sorted({(2 * i + 1) * length // (2 * count) for i in range(count)})


def _draw_crop(video: VideoRecipe, generator: torch.Generator) -> tuple[int, int, int, int]:
    size, top, left = torch.rand(3, generator=generator).tolist()
    share = 1 / video.margin + size * (1 - 1 / video.margin)
    full_height, full_width = video.decoded_size
    height, width = round(full_height * share), round(full_width * share)
    return int(top * (full_height - height + 1)), int(left * (full_width - width + 1)), height, width
