"""The mask page in a real browser: picking tiles by mouse and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from draftattn.eval.mask_page import write_masks
from draftattn.eval.masks import MaskRecord, block_boxes
from draftattn.layout import BlockLayout, TokenGrid, block_layout

GRID = TokenGrid(3, 4, 8)
LAYOUT = block_layout(GRID, (1, 2, 4))  # 2 × 2 tiles a frame
LAYERS, STEPS, HEADS = (2, 5), (1, 3), (0, 4)
BLOCKS = LAYOUT.num_video_blocks


def records(layout: BlockLayout = LAYOUT) -> list[MaskRecord]:
    """Random maps for every layer and step."""
    blocks = layout.num_video_blocks
    generator = torch.Generator().manual_seed(0)
    found = []
    for layer in LAYERS:
        for step in STEPS:
            draft = torch.softmax(2 * torch.randn(len(HEADS), blocks, blocks, generator=generator), -1)
            chosen = torch.rand(draft.shape, generator=generator) < 0.4
            found.append(MaskRecord(layer, step, HEADS, draft, chosen, layout))
    return found


def record(layer: int, step: int) -> MaskRecord:
    return next(one for one in records() if (one.layer, one.step) == (layer, step))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a recording over a grey video."""
    folder = tmp_path_factory.mktemp("masks")
    return write_masks(folder, records(), torch.full((9, 3, 64, 128), 0.5), {"Model": "tiny"}, "a dog").page


@pytest.fixture
def page(chromium: Any, path: Path) -> Any:
    """The page as it opens on a laptop."""
    chromium.open(path)
    chromium.wait("byId('reading').textContent")
    yield chromium
    assert chromium.problems == []


def settle(page: Any) -> dict[str, Any]:
    """Waits for the drawing, and gives the state and what is shown."""
    page.run("update()")
    return page.run("({...state, chosen: shown.chosen, shares: shown.shares, kept: shown.record.kept})")


def block_at(frame: int, row: float, column: float) -> int:
    return next(
        i
        for i, (f0, f1, y0, y1, x0, x1) in enumerate(block_boxes(LAYOUT))
        if f0 <= frame < f1 and y0 <= row < y1 and x0 <= column < x1
    )


def test_asks_no_network(page: Any, path: Path) -> None:
    own = path.resolve().as_uri()
    assert {url for url in page.requests if not url.startswith(("blob:", "data:"))} == {own}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 800, False), (390, 844, True)], ids=["laptop", "phone"])
def test_fits_the_window(chromium: Any, path: Path, width: int, height: int, phone: bool, dark: bool) -> None:
    chromium.open(path, width, height, dark=dark, phone=phone)
    chromium.wait("byId('reading').textContent")
    assert chromium.run("document.documentElement.scrollWidth") == width
    assert chromium.run("document.querySelectorAll('#frames canvas').length") == GRID.frames
    assert chromium.problems == []


def test_shows_what_was_recorded(page: Any) -> None:
    for i, layer in enumerate(LAYERS):
        for j, step in enumerate(STEPS):
            for k in range(len(HEADS)):
                for name, number in (("layers", i), ("steps", j), ("heads", k)):
                    page.run(f"byId('{name}').querySelectorAll('input')[{number}].click()")
                found = settle(page)
                expected = record(layer, step)
                query = found["query"]
                assert found["chosen"] == expected.chosen[k, query].tolist()
                assert found["shares"] == pytest.approx(expected.draft[k, query].tolist(), rel=0.03, abs=1e-5)
                count = int(expected.chosen[k, query].sum())
                assert page.run("document.querySelector('#reading b').textContent") == f"{count} of {BLOCKS}"
                kept = 100 * float(expected.kept[k, query])
                assert f"hold {kept:.{1 if kept < 10 else 0}f} %" in page.run("byId('reading').textContent")


def test_tiles_of_several_frames_are_counted_in_all_of_them(chromium: Any, tmp_path: Path) -> None:
    layout = block_layout(GRID, (3, 2, 4))
    video = torch.full((9, 3, 64, 128), 0.5)
    chromium.open(write_masks(tmp_path, records(layout), video, {"Model": "tiny"}, "a dog").page)
    chromium.wait("byId('reading').textContent")
    reading = chromium.run("byId('reading').textContent")
    assert "of frames 1–3 is compared with" in reading
    assert "in 3 of 3 frames" in reading


def test_tiles_are_picked_by_clicks(page: Any) -> None:
    page.click("#frames figure:nth-of-type(3) canvas", at=(0.8, 0.2))
    assert settle(page)["query"] == block_at(2, 0.8, 6.4)
    assert page.run("byId('query-caption').textContent") == "Frame 3 of 3"
    page.click("#query-canvas", at=(0.2, 0.8))
    assert settle(page)["query"] == block_at(2, 3.2, 1.6)
    page.click("#block-mask", at=(0.5, 1.5 / BLOCKS))
    assert settle(page)["query"] == 1


def test_tiles_are_picked_by_keys(page: Any) -> None:
    page.click("#query-canvas", at=(0.2, 0.2))
    page.run("byId('query').focus()")
    start = settle(page)["query"]
    assert start == block_at(1, 0, 0)
    for key, where in (
        ("ArrowRight", (1, 0, 4)),
        ("ArrowDown", (1, 2, 4)),
        ("ArrowDown", (1, 2, 4)),
        ("PageDown", (2, 2, 4)),
        ("ArrowLeft", (2, 2, 0)),
        ("PageUp", (1, 2, 0)),
        ("ArrowUp", (1, 0, 0)),
    ):
        page.press(key)
        assert settle(page)["query"] == block_at(*where)
    before = settle(page)["layer"]
    page.press("l")
    assert settle(page)["layer"] != before


def test_the_other_direction(page: Any) -> None:
    page.run("byId('directions').querySelectorAll('input')[1].click()")
    found = settle(page)
    head = HEADS.index(found["head"])
    expected = record(found["layer"], found["step"]).chosen[head, :, found["query"]]
    assert found["chosen"] == expected.tolist()
    assert f"looked at by {int(expected.sum())} of {BLOCKS}" in page.run("byId('reading').textContent")


def test_what_is_skipped_is_dark(page: Any) -> None:
    page.click("#heat")
    found = settle(page)
    for block, (frame, _, y0, y1, x0, x1) in enumerate(block_boxes(LAYOUT)):
        if block == found["query"]:
            continue
        x, y = round((x0 + x1) / 2 / 8 * 128), round((y0 + y1) / 2 / 4 * 64)
        pixel = page.run(f"[...strip[{frame}].canvas.getContext('2d').getImageData({x}, {y}, 1, 1).data]")
        assert (pixel[0] > 100) is found["chosen"][block]
