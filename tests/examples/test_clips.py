import dataclasses

import pytest
import torch

from draftattn.errors import InputError
from examples.tiny_wan.autoencoder import draw_crops
from examples.tiny_wan.clips import (
    CAPTIONS,
    Scene,
    Shot,
    Window,
    cut,
    draw_windows,
    held_out_windows,
    learnt_windows,
    read_scenes,
    read_shots,
)
from examples.tiny_wan.recipe import PRESETS, Crops, VideoRecipe

CPU = torch.device("cpu")
VIDEO = PRESETS["smoke"].video
# prompts of the README, the Makefile and the study
PROMPTS = {
    "hands moving red cups on a white table",
    "a woman playing with a dog on a path",
    "a man juggling a football in a park",
    "cars driving on a road seen from above",
}


def test_the_captions_know_the_prompts_in_use():
    scenes = read_scenes(CAPTIONS)
    assert {scene.caption for scene in scenes if not scene.held_out} >= PROMPTS
    assert any(scene.held_out for scene in scenes)


def test_held_out_stretches_do_not_overlap_learnt_ones():
    scenes = read_scenes(CAPTIONS)
    for held in (scene for scene in scenes if scene.held_out):
        for learnt in (scene for scene in scenes if scene.file == held.file and not scene.held_out):
            assert learnt.end is not None
            assert learnt.end <= held.start


def test_clips_become_shots(clips):
    shots = read_shots(clips, read_scenes(clips / "clips.json"), VIDEO, CPU)
    assert [tuple(shot.frames.shape) for shot in shots] == [(14, 3, 72, 126), (9, 3, 72, 126), (24, 3, 72, 126)]
    assert all(shot.frames.dtype == torch.uint8 for shot in shots)
    assert all(shot.frames.float().std() > 10 for shot in shots)


def test_windows(clips):
    shots = read_shots(clips, read_scenes(clips / "clips.json"), VIDEO, CPU)
    video = dataclasses.replace(VIDEO, windows_per_caption=20)
    windows = draw_windows(shots, video, torch.Generator().manual_seed(0))
    captions = [shots[window.shot].scene.caption for window in windows]
    assert captions == ["a clock"] * 20 + ["moving bars"] * 20
    assert not any(shots[window.shot].scene.held_out for window in [*windows, *learnt_windows(shots, VIDEO)])
    assert all(shots[window.shot].scene.held_out for window in held_out_windows(shots, VIDEO, 2))
    for window in windows:
        pixels = cut(shots[window.shot], window, VIDEO)
        assert pixels.shape == (3, 9, 64, 112)
        assert pixels.isfinite().all()
        assert pixels.abs().max() <= 1


def test_a_cut_takes_the_frames_it_names():
    frames = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 64, 112)
    shot = Shot(Scene("x", "x"), frames, stride=2)
    pixels = cut(shot, Window(0, 3, (0, 0, 64, 112)), VIDEO)
    assert ((pixels[0, :, 0, 0] + 1) * 127.5).round().tolist() == list(range(3, 20, 2))


def test_crops_stay_inside_and_leave_out_what_is_held_out():
    learnt = Shot(Scene("x", "x"), torch.full((17, 3, 40, 56), 255, dtype=torch.uint8), stride=2)
    crops = draw_crops([learnt], Crops(8, 9, 40, 32), torch.Generator().manual_seed(0))
    assert crops.shape == (8, 3, 9, 40, 32)
    assert (crops == 1).all()


def test_bad_input(clips, tmp_path):
    with pytest.raises(InputError, match=r"no\.mp4"):
        read_shots(clips, [Scene("no.mp4", "x")], VIDEO, CPU)
    with pytest.raises(InputError, match="needs at least 33 frames"):
        read_shots(clips, [Scene("a.mp4", "x")], dataclasses.replace(VIDEO, num_frames=33), CPU)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="cannot be decoded"):
        read_shots(tmp_path, [Scene("broken.mp4", "x")], VIDEO, CPU)
    (tmp_path / "captions.json").write_text('{"clips": [{"scenes": []}, 3]}')
    with pytest.raises(InputError, match="cannot be read"):
        read_scenes(tmp_path / "captions.json")
    with pytest.raises(InputError, match="height"):
        VideoRecipe(height=100)
