"""Recording masks during a run, and the pictures made of them."""

from __future__ import annotations

import base64
import json
import re
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from draftattn import DraftConfig, enable
from draftattn.cli import main
from draftattn.draft import draft_map
from draftattn.errors import InputError
from draftattn.eval.mask_page import write_masks
from draftattn.eval.mask_pictures import frame_starts, mask_picture, stills
from draftattn.eval.masks import MaskRecord, RecordingPolicy, block_boxes, spread
from draftattn.inputs import AttentionInputs
from draftattn.kernels.block_mask import BlockMask
from draftattn.layout import TokenGrid, block_layout
from draftattn.policies.draft import DraftPolicy
from draftattn.policy import CallContext

TINY_WAN = str(Path(__file__).parents[3] / "assets" / "tiny-wan")
GRIDS = [((3, 5, 7), (1, 2, 4)), ((5, 3, 9), (2, 2, 4)), ((1, 1, 1), (1, 1, 1)), ((4, 8, 8), (4, 4, 4))]


@pytest.mark.parametrize(("grid", "tile"), GRIDS, ids=str)
def test_boxes_hold_every_token_once(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    layout = block_layout(TokenGrid(*grid), tile, num_text_tokens=3)
    owner = torch.full(grid, -1)
    for block, (f0, f1, y0, y1, x0, x1) in enumerate(block_boxes(layout)):
        part = owner[f0:f1, y0:y1, x0:x1]
        assert part.numel() == int(layout.offsets[block + 1] - layout.offsets[block])
        assert bool((part == -1).all())
        owner[f0:f1, y0:y1, x0:x1] = block
    assert int(owner.min()) == 0
    starts = [int(owner[frame].min()) for frame in range(grid[0])]
    assert sorted(set(starts))[1:] == frame_starts(record_of(grid, tile))


def record_of(grid: tuple[int, int, int], tile: tuple[int, int, int], heads: tuple[int, ...] = (0, 3)) -> MaskRecord:
    """A record with random maps."""
    layout = block_layout(TokenGrid(*grid), tile)
    shape = (len(heads), layout.num_video_blocks, layout.num_video_blocks)
    generator = torch.Generator().manual_seed(0)
    draft = torch.softmax(4 * torch.randn(shape, generator=generator), -1)
    chosen = draft >= draft.amax(-1, keepdim=True) * 0.2
    return MaskRecord(layer=1, step=2, heads=heads, draft=draft, chosen=chosen, layout=layout)


@pytest.mark.parametrize(
    "settings",
    [{}, {"selection": "head"}, {"residual": False}, {"tile": (2, 2, 4)}, {"warmup": 1}],
    ids=str,
)
def test_recording_changes_nothing(tiny: ModuleType, settings: dict[str, Any]) -> None:
    pipe, config = tiny.wan_pipeline(), tiny.config(**settings)
    enable(pipe, config)
    expected = tiny.generate(pipe, guidance_scale=4.0)
    recorder = RecordingPolicy(DraftPolicy(config), layers=(0, 2), steps=(1, 3), heads=(1,))
    enable(pipe, config, policy=recorder)
    assert torch.equal(tiny.generate(pipe, guidance_scale=4.0), expected)
    assert [(record.layer, record.step) for record in recorder.records] == [(0, 1), (2, 1), (0, 3), (2, 3)]


def test_hunyuan_is_recorded_without_its_text(tiny: ModuleType) -> None:
    pipe, config = tiny.hunyuan_pipeline(), tiny.config()
    recorder = RecordingPolicy(DraftPolicy(config), layers=(0, 3), steps=(2,), heads=(0, 1))
    enable(pipe, config)
    expected = tiny.generate(pipe)
    enable(pipe, config, policy=recorder)
    assert torch.equal(tiny.generate(pipe), expected)
    assert len(recorder.records) == 2
    for record in recorder.records:
        blocks = record.layout.num_video_blocks
        assert record.chosen.shape == record.draft.shape == (2, blocks, blocks)


class _Spy:
    """A policy that notes what it saw and gave."""

    def __init__(self, policy: DraftPolicy) -> None:
        self.policy = policy
        self.seen: dict[tuple[int, int | None, str | None], tuple[Tensor, Tensor]] = {}

    def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
        mask = self.policy(inputs, context, scale)
        where = (context.layer, context.step, context.branch)
        self.seen[where] = draft_map(inputs, scale).clone(), mask.block_map.clone()
        return mask


def test_records_are_what_the_policy_saw(tiny: ModuleType) -> None:
    pipe, config = tiny.wan_pipeline(), tiny.config(selection="head")
    spy = _Spy(DraftPolicy(config))
    recorder = RecordingPolicy(spy, layers=(1,), steps=(2,), heads=(1, 0))
    enable(pipe, config, policy=recorder)
    tiny.generate(pipe, guidance_scale=4.0)
    (record,) = recorder.records
    draft, block_map = spy.seen[1, 2, "cond"]
    torch.testing.assert_close(record.draft, draft[0, [1, 0]], rtol=0, atol=0)
    assert torch.equal(record.chosen, block_map[0, [1, 0]])
    assert not torch.equal(record.chosen, spy.seen[1, 2, "uncond"][1][0, [1, 0]])
    torch.testing.assert_close(record.kept, (draft[0, [1, 0]] * block_map[0, [1, 0]]).sum(-1))


def test_the_unconditional_branch_is_left_out() -> None:
    layout = block_layout(TokenGrid(2, 4, 4), (1, 2, 4))
    cond, uncond = (AttentionInputs(*torch.randn(3, 2, 32, 2, 16), layout) for _ in range(2))
    recorder = RecordingPolicy(DraftPolicy(DraftConfig(sparsity=0.5)), layers=[0], steps=[1], heads=[0])
    for inputs, branch, layer, step in ((uncond, "uncond", 0, 1), (cond, "cond", 1, 1), (cond, "cond", 0, None)):
        recorder(inputs, CallContext(layer=layer, step=step, branch=branch))
        assert recorder.records == []
    recorder(cond, CallContext(layer=0, step=1, branch="cond"))
    (record,) = recorder.records
    torch.testing.assert_close(record.draft[0], draft_map(cond)[-1, 0])  # of a batch the last item


@pytest.mark.parametrize(("num_frames", "grid_frames"), [(33, 9), (9, 3), (1, 1), (5, 5)])
def test_stills_are_from_the_middle_of_what_they_stand_for(num_frames: int, grid_frames: int) -> None:
    shades = torch.arange(num_frames) / 255
    video = shades.view(-1, 1, 1, 1).expand(-1, 3, 16, 24)
    shown = [image.getpixel((3, 3))[0] for image in stills(video, TokenGrid(grid_frames, 2, 3))]
    assert len(shown) == grid_frames
    assert shown[0] == 0
    each = (num_frames - 1) // max(1, grid_frames - 1)
    for number, frame in enumerate(shown[1:], 1):
        assert (number - 1) * each < frame <= number * each


def test_wide_videos_are_made_small() -> None:
    (still,) = stills(torch.rand(1, 3, 720, 1280), TokenGrid(1, 1, 1))
    assert still.size == (640, 360)


def test_files(tmp_path: Path) -> None:
    records = [record_of((3, 5, 7), (1, 2, 4))]
    written = write_masks(tmp_path / "new", records, torch.rand(9, 3, 80, 112), {"Model": "<tiny>"}, "a <dog>")
    names = {path.name for path in written.pictures}
    assert names == {f"{kind}-layer01-head0{head}-step03.png" for kind in ("draft", "mask") for head in (0, 3)}
    blocks = records[0].layout.num_video_blocks
    for path in written.pictures:
        with Image.open(path) as image:
            assert image.width == image.height >= 512
            assert image.width % blocks == 0
    with Image.open(tmp_path / "new" / "mask-layer01-head03-step03.png") as image:
        cell = image.width // blocks
        middles = np.asarray(image)[cell // 2 :: cell, cell // 2 :: cell]
    assert np.array_equal(middles, mask_picture(records[0], 3))
    assert np.array_equal(middles[..., 0] > 128, records[0].chosen[1].numpy())
    with Image.open(written.animation) as image:
        assert image.n_frames == 3
    content = written.page.read_text()
    assert "a &lt;dog&gt;" in content
    assert "<dog>" not in content.split("</main>")[0]
    assert not re.search(r'(src|href)="(?!#)', content)


def test_page_holds_the_maps(tmp_path: Path) -> None:
    record = record_of((3, 5, 7), (1, 2, 4))
    page = write_masks(tmp_path, [record], torch.rand(9, 3, 80, 112), {}, "a dog").page.read_text()
    content = re.search(r'id="record-0">(.*?)</script>', page)
    assert content is not None
    unpacked = np.frombuffer(zlib.decompress(base64.b64decode(content[1])), np.uint8)
    heads, blocks, _ = record.draft.shape
    levels = unpacked[: heads * blocks * blocks].reshape(record.draft.shape)
    shares = 10.0 ** (5 * (levels / 255 - 1))
    known = record.draft.numpy() > 1e-5
    np.testing.assert_allclose(shares[known], record.draft.numpy()[known], rtol=0.03)
    bits = unpacked[heads * blocks * blocks :].reshape(heads, -1)
    chosen = np.unpackbits(bits, axis=-1)[:, : blocks * blocks].reshape(record.chosen.shape)
    assert np.array_equal(chosen.astype(bool), record.chosen.numpy())
    data = re.search(r'id="data">(.*?)</script>', page)
    assert data is not None
    kept = json.loads(data[1])["records"][0]["kept"]
    np.testing.assert_allclose(kept, record.kept, atol=1e-4)


def test_nothing_recorded_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no mask was recorded"):
        write_masks(tmp_path, [], torch.rand(1, 3, 8, 8), {}, "a dog")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_spread_is_ascending_and_distinct(count: int) -> None:
    chosen = spread(range(3, 10), count)
    assert len(chosen) == min(count, 7)
    assert sorted(set(chosen)) == list(chosen)
    assert set(chosen) <= set(range(3, 10))
    if count > 1:
        assert (chosen[0], chosen[-1]) == (3, 9)


SMALL = ["--height", "64", "--width", "96", "--frames", "5", "--steps", "4", "--guidance", "3", "--tile", "1x2x2"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["draftattn", "masks", "--model", TINY_WAN, "--prompt", "a dog", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code if isinstance(stop.value.code, int) else 0


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = ["--layers", "0,9", "--heads", "1", "--at-steps", "4"]
    assert run(monkeypatch, *SMALL, *chosen, "--warmup", "1", "--output", str(tmp_path)) == 0
    pictures = {f"{kind}-layer{layer}-head01-step04.png" for kind in ("draft", "mask") for layer in ("00", "09")}
    assert {path.name for path in tmp_path.iterdir()} == {"masks.html", "masks.gif", *pictures}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "12"], ["layers is 12", "0 to 9"]),
        (["--layers", "3", "--dense-layers", "3"], ["layers is 3", "one of them"]),
        (["--heads", "99"], ["heads is 99", "0 to"]),
        (["--heads", "x"], ["heads is 'x'", "0,1,5"]),
        (["--at-steps", "1,4", "--warmup", "2"], ["at-steps is 1", "3 to 4", "first 2 of 4"]),
        (["--warmup", "4"], ["no at-steps to record", "first 4 of 4"]),
        (["--output", "/proc/masks"], ["/proc/masks", "cannot be written"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_input_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    import draftattn.eval.loading

    monkeypatch.setattr(draftattn.eval.loading, "load_pipeline", None)
    assert run(monkeypatch, *SMALL, *options) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("draftattn: ")
    assert "\n" not in message
    for word in words:
        assert word in message
