"""Pictures of draft maps and block masks: PNG for each, and a GIF over the video."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from draftattn.errors import InputError
from draftattn.eval.masks import Box, MaskRecord
from draftattn.files import written_whole
from draftattn.layout import TokenGrid

Pixels = NDArray[np.uint8]

# Shares of attention differ by orders of magnitude, so colours follow their logarithm, over this many.
DECADES = 2
# Over the video fewer: chosen tiles are among the largest.
HEAT_DECADES = 1
RAMP = ((13, 8, 35), (74, 20, 88), (150, 38, 85), (214, 78, 50), (247, 148, 40), (252, 224, 130))
QUERY_COLOR = (76, 201, 240)
CHOSEN_COLOR = (255, 214, 120)


def share_levels(shares: Tensor, decades: float = DECADES) -> Tensor:
    """Shares of attention as uint8: 255 for all of it, 0 for ``10^-decades`` and below, even in the logarithm.

    >>> share_levels(torch.tensor([1.0, 0.1, 1e-9])).tolist()
    [255, 128, 0]
    """
    return ((shares.clamp(min=1e-30).log10() / decades + 1).clamp(0, 1) * 255).round().to(torch.uint8)


def colored(levels: Tensor) -> Pixels:
    """Levels as colours from dark violet to pale yellow: uint8 ``[..., 3]``."""
    anchors = np.linspace(0, 255, len(RAMP))
    table = np.stack([np.interp(np.arange(256), anchors, [color[i] for color in RAMP]) for i in range(3)], -1)
    return table.round().astype(np.uint8)[levels.numpy()]


def draft_picture(record: MaskRecord, head: int) -> Pixels:
    """The draft map of a head, queries down and keys across: uint8 ``[V, V, 3]``."""
    return colored(share_levels(_row_relative(record.draft[record.heads.index(head)])))


def mask_picture(record: MaskRecord, head: int) -> Pixels:
    """The block mask of a head, chosen blocks light: uint8 ``[V, V, 3]``."""
    chosen = record.chosen[record.heads.index(head)].numpy()[..., None]
    return np.where(chosen, np.array(CHOSEN_COLOR), np.array(RAMP[0])).astype(np.uint8)


def save_matrix(path: Path, pixels: Pixels, record: MaskRecord, least_side: int = 512) -> None:
    """Saves the picture of a map as PNG, enlarged in whole steps, with a line where a frame begins."""
    factor = max(1, -(-least_side // len(pixels)))
    large = np.repeat(np.repeat(pixels, factor, 0), factor, 1)
    if factor >= 4:
        for block in frame_starts(record):
            large[block * factor], large[:, block * factor] = 128, 128
    with written_whole(path) as temporary:
        Image.fromarray(large).save(temporary)


def frame_starts(record: MaskRecord) -> list[int]:
    """The first video block of every further frame, or group of frames that share blocks."""
    layout = record.layout
    groups = -(-layout.grid.frames // layout.tile.frames)
    per_group = layout.num_video_blocks // groups
    return list(range(per_group, layout.num_video_blocks, per_group))


def stills(video: Tensor, grid: TokenGrid, widest: int = 640) -> list[Image.Image]:
    """The video frame in the middle of those that each token frame stands for.

    Args:
        video: ``[N, C, H, W]`` in [0, 1].
        grid: the token grid.
        widest: most pixels across.

    Returns:
        ``grid.frames`` images.
    """
    last = len(video) - 1
    # the first token frame stands for one video frame, the others for as many as are left
    each = last / max(1, grid.frames - 1)
    found = []
    for number in (min(last, max(0, int((frame - 0.5) * each + 0.5))) for frame in range(grid.frames)):
        image = Image.fromarray((video[number].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
        if image.width > widest:
            image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
        found.append(image)
    return found


def jpeg(image: Image.Image) -> bytes:
    """An image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def overlay(
    still: Image.Image, frame: int, query: int, record: MaskRecord, head: int, boxes: Sequence[Box]
) -> Image.Image:
    """A frame of the video with what one query block attends to: heat and outlines; what is skipped is dimmed."""
    row = record.heads.index(head)
    levels = share_levels(_row_relative(record.draft[row][query : query + 1])[0], HEAT_DECADES)
    heat = colored(levels)
    _, height, width = record.layout.grid
    picture = np.asarray(still).astype(np.float32)
    across, down = still.width / width, still.height / height
    here = [i for i, box in enumerate(boxes) if box[0] <= frame < box[1]]
    places = {i: _place(boxes[i], across, down) for i in here}
    for i in here:
        left, top, right, bottom = places[i]
        part = picture[top:bottom, left:right]
        if record.chosen[row, query, i]:
            strength = 0.2 + 0.35 * float(levels[i]) / 255
            part[:] = part * (1 - strength) + heat[i].astype(np.float32) * strength
        else:
            part[:] = part.mean(-1, keepdims=True) * 0.28
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for i in here:
        left, top, right, bottom = places[i]
        if record.chosen[row, query, i]:
            canvas.rectangle((left, top, right - 1, bottom - 1), outline=CHOSEN_COLOR)
    if query in places:
        left, top, right, bottom = places[query]
        canvas.rectangle((left, top, right - 1, bottom - 1), outline=QUERY_COLOR, width=3)
    return image


def save_gif(
    path: Path,
    images: Sequence[Image.Image],
    record: MaskRecord,
    head: int,
    query: int,
    boxes: Sequence[Box],
    least_height: int = 320,
) -> None:
    """Saves a GIF: on the left the frames of the video with `overlay`, on the right the block mask with the query.

    Raises:
        InputError: if it cannot be written.
    """
    zoom = max(1, round(least_height / images[0].height))
    images = [image.resize((image.width * zoom, image.height * zoom)) for image in images]
    side = images[0].height
    matrix = Image.fromarray(mask_picture(record, head)).resize((side, side), Image.Resampling.NEAREST)
    scale = side / record.layout.num_video_blocks
    canvas = ImageDraw.Draw(matrix)
    middle = (query + 0.5) * scale
    reach = max(1, scale / 2)
    canvas.rectangle((0, middle - reach, side - 1, middle + reach), outline=QUERY_COLOR, width=2)
    pages = []
    for frame, still in enumerate(images):
        page = Image.new("RGB", (still.width + side + 8, side), (20, 20, 22))
        page.paste(overlay(still, frame, query, record, head, boxes), (0, 0))
        page.paste(matrix, (still.width + 8, 0))
        pages.append(page)
    try:
        with written_whole(path) as temporary:
            pages[0].save(temporary, save_all=True, append_images=pages[1:], duration=400, loop=0)
    except OSError as error:
        raise InputError(f"picture {str(path)!r} could not be written: {error.strerror}") from error


def _row_relative(draft: Tensor) -> Tensor:
    """A row's entries in relation to its largest: a map of many blocks holds small shares only."""
    return draft / draft.amax(-1, keepdim=True)


def _place(box: Box, across: float, down: float) -> tuple[int, int, int, int]:
    _, _, top, bottom, left, right = box
    return round(left * across), round(top * down), round(right * across), round(bottom * down)
