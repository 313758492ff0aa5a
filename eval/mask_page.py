"""The page of a mask recording: pick a tile of the video and see which tiles it attends to."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.eval.mask_pictures import (
    QUERY_COLOR,
    RAMP,
    draft_picture,
    jpeg,
    mask_picture,
    save_gif,
    save_matrix,
    share_levels,
    stills,
)
from draftattn.eval.masks import MaskRecord, block_boxes
from draftattn.eval.page import attachment, build_page, glossary, save_page, text
from draftattn.files import check_writable

# The page keeps shares as bytes of their logarithm: steps of 5 %, down to a hundred-thousandth.
_DECADES = 5.0


@dataclass(frozen=True)
class MaskFiles:
    """What `write_masks` wrote.

    Args:
        page: the page.
        animation: the GIF.
        pictures: a draft map and a block mask for each layer, head and step.
    """

    page: Path
    animation: Path
    pictures: tuple[Path, ...]


def write_masks(
    folder: Path, records: Sequence[MaskRecord], video: Tensor, facts: dict[str, Any], title: str
) -> MaskFiles:
    """Writes the page, the GIF and the pictures of a recording.

    Args:
        folder: where to; made if it is not there.
        records: what `RecordingPolicy` kept.
        video: ``[N, C, H, W]`` in [0, 1], the generated video.
        facts: what the page says about the run, in words.
        title: what the video shows.

    Raises:
        InputError: if nothing was recorded or a file cannot be written.
    """
    if not records:
        raise InputError("no mask was recorded; the chosen layers and steps made none")
    check_writable(folder / "masks.html")
    records = sorted(records, key=lambda record: (record.layer, record.step))
    layout = records[0].layout
    boxes = block_boxes(layout)
    images = stills(video, layout.grid)
    query = _middle_block(records[0])
    pictures: list[Path] = []
    try:
        for record in records:
            for head in record.heads:
                where = f"layer{record.layer:02d}-head{head:02d}-step{record.step + 1:02d}.png"
                for kind, pixels in (("draft", draft_picture(record, head)), ("mask", mask_picture(record, head))):
                    save_matrix(folder / f"{kind}-{where}", pixels, record)
                    pictures.append(folder / f"{kind}-{where}")
    except OSError as error:
        raise InputError(f"pictures cannot be written into {str(folder)!r}: {error.strerror}") from error
    middle = records[len(records) // 2]
    head = middle.heads[len(middle.heads) // 2]
    save_gif(folder / "masks.gif", images, middle, head, query, boxes)
    data = {
        "glossary": glossary(),
        "grid": list(layout.grid),
        "boxes": boxes,
        "frames": ["data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode() for image in images],
        "frame_size": list(images[0].size),
        "num_video_frames": len(video),
        "layers": sorted({record.layer for record in records}),
        "steps": sorted({record.step for record in records}),
        "heads": list(records[0].heads),
        "decades": _DECADES,
        "ramp": RAMP,
        "query_color": QUERY_COLOR,
        "query": query,
        "start": {"layer": middle.layer, "step": middle.step, "head": head},
        "records": [
            {
                "layer": record.layer,
                "step": record.step,
                "id": f"record-{i}",
                "kept": [[round(share, 4) for share in row] for row in record.kept.tolist()],
            }
            for i, record in enumerate(records)
        ],
        "facts": [[name, str(value)] for name, value in facts.items() if value is not None],
    }
    slots = {
        "title": text(f"Where it attends · {title}"),
        "prompt": text(title),
        "attachments": "\n".join(attachment(f"record-{i}", packed(record)) for i, record in enumerate(records)),
    }
    page = folder / "masks.html"
    save_page(page, build_page("masks.html", slots, data))
    return MaskFiles(page, folder / "masks.gif", tuple(pictures))


def packed(record: MaskRecord) -> bytes:
    """The maps of a record, compressed: for each head the draft's levels ``[V, V]``, then for each the mask's bits.

    The bits of a head's mask follow each other row by row, the highest of a byte first.
    """
    levels = share_levels(record.draft, _DECADES).numpy()
    bits = np.packbits(record.chosen.numpy().reshape(len(record.heads), -1), axis=-1)
    return zlib.compress(levels.tobytes() + bits.tobytes(), 9)


def _middle_block(record: MaskRecord) -> int:
    """The block at the centre of the video."""
    grid = record.layout.grid
    token = (grid.frames // 2 * grid.height + grid.height // 2) * grid.width + grid.width // 2
    place = int(record.layout.inverse[token])
    return int(torch.searchsorted(record.layout.offsets.cpu(), place, right=True)) - 1
