import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.eval.metrics import (
    METRICS,
    FrameScores,
    applicable_metrics,
    check_metrics,
    flicker,
    lpips,
    psnr,
    score_chunks,
    score_video,
    ssim,
)
from draftattn.eval.metrics import scores as scores_module
from draftattn.eval.metrics.lpips import WEIGHTS
from draftattn.eval.metrics.pair import exact_convolutions

DATA = Path(__file__).parent / "data"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the package puts a function of this name in the place of the module
lpips_module = __import__("sys").modules["draftattn.eval.metrics.lpips"]


def image(name: str) -> Tensor:
    pixels = np.array(Image.open(DATA / f"{name}.png").convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].to(DEVICE)


def video(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_known_error() -> None:
    reference = video(3, 3, 20, 30) * 0.5
    offset = torch.tensor([0.1, 0.01, 0.2]).view(3, 1, 1, 1)
    expected = -20 * offset.flatten().log10()
    torch.testing.assert_close(psnr(reference + offset, reference), expected, rtol=1e-4, atol=1e-4)


def test_identical_frames() -> None:
    frames = video(2, 3, 32, 40)
    assert psnr(frames, frames).isinf().all()
    torch.testing.assert_close(ssim(frames, frames), torch.ones(2))
    assert lpips(frames, frames).tolist() == [0, 0]
    assert flicker(frames, frames)[1:].tolist() == [0]


def test_scores_get_worse_with_noise() -> None:
    reference = video(3, 3, 48, 64)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    levels = (0.01, 0.05, 0.1, 0.2, 0.4)
    scores = [score_video((reference + level * noise).clamp(0, 1), reference) for level in levels]
    assert list(scores[0]) == list(METRICS)
    for name, metric in METRICS.items():
        means = [score[name].mean for score in scores]
        assert means == sorted(means, reverse=metric.higher_is_better), name
        assert len(set(means)) == len(levels)


def test_bytes_count_as_the_values_they_stand_for() -> None:
    pair = [(video(2, 3, 40, 33, seed=seed) * 255).byte() for seed in (0, 1)]
    from_bytes, from_floats = score_video(*pair), score_video(*(frames.float() / 255 for frames in pair))
    assert {name: score.to_json() for name, score in from_bytes.items()} == {
        name: score.to_json() for name, score in from_floats.items()
    }


def test_only_the_changed_frame_is_worse() -> None:
    reference = video(5, 3, 40, 40)
    changed = reference.clone()
    changed[2] = 1 - changed[2]
    scores = score_video(changed, reference)
    assert [scores[name].worst_frame for name in ("psnr", "ssim", "lpips")] == [2, 2, 2]
    per_frame = scores["flicker"].per_frame
    assert math.isnan(per_frame[0])
    assert per_frame[1] == per_frame[4] == 0
    assert min(per_frame[2:4]) > 50


def test_flicker_ignores_what_stands_still_or_is_in_both() -> None:
    reference = video(4, 3, 16, 16) * 0.5
    still_error = video(1, 3, 16, 16, seed=1) * 0.5
    assert flicker(reference + still_error, reference)[1:].max() < 1e-4
    blinking = reference + torch.tensor([0.0, 0.1, 0.0, 0.1]).view(4, 1, 1, 1)
    torch.testing.assert_close(flicker(blinking, reference)[1:], torch.full((3,), 25.5), rtol=1e-4, atol=0)


def test_flicker_equals_its_formula() -> None:
    x, y = video(6, 3, 9, 7).double(), video(6, 3, 9, 7, seed=1).double()
    expected = 255 * (x.diff(dim=0) - y.diff(dim=0)).abs().mean((1, 2, 3))
    torch.testing.assert_close(flicker(x.float(), y.float())[1:].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "published"), [("ex_p0", 0.722), ("ex_p1", 0.138)])
def test_lpips_reproduces_the_published_pair(name: str, published: float) -> None:
    assert round(lpips(image("ex_ref"), image(name)).item(), 3) == published


def alexnet_features() -> nn.Sequential:
    relu, pool = nn.ReLU(), nn.MaxPool2d(3, 2)
    sides = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
    first, second, *others = [nn.Conv2d(*side) for side in sides]
    layers: list[nn.Module] = [first, relu, pool, second, relu, pool]
    for convolution in others:
        layers += [convolution, relu]
    return nn.Sequential(*layers, pool)


@pytest.mark.parametrize("source", ["own", "torchvision"])
def test_lpips_equals_torchmetrics(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file
    from torchmetrics.functional.image import lpips as theirs

    if source == "torchvision":
        features = pytest.importorskip("torchvision").models.alexnet(weights=None).features
    else:
        features = alexnet_features()
    prefix = "features."
    weights = {
        name.removeprefix(prefix): w.float() for name, w in load_file(WEIGHTS).items() if name.startswith(prefix)
    }
    features.load_state_dict(weights)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained=False: features)
    network = theirs._LPIPS(net="alex").eval()
    for height, width in ((64, 64), (31, 47), (90, 120)):
        x = video(3, 3, height, width)
        y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
        expected = network(x, y, normalize=True).flatten()
        torch.testing.assert_close(lpips(x.to(DEVICE), y.to(DEVICE)).cpu(), expected, rtol=1e-4, atol=1e-6)


def test_lpips_in_batches_equals_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = video(5, 3, 40, 50), video(5, 3, 40, 50, seed=1)
    expected = torch.cat([lpips(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)])
    monkeypatch.setattr(lpips_module, "_PIXELS_PER_BATCH", 2 * 40 * 50)
    torch.testing.assert_close(lpips(x, y), expected)


def test_lpips_refuses_small_frames() -> None:
    lpips(video(1, 3, 31, 31), video(1, 3, 31, 31))
    with pytest.raises(ValueError, match="at least 31 pixels"):
        lpips(video(1, 3, 30, 64), video(1, 3, 30, 64))


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_chunks_do_not_show(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = video(7, 3, 32, 32), video(7, 3, 32, 32, seed=1)
    expected = score_video(x, y)
    found = score_chunks(zip(x.split(size), y.split(size), strict=True), list(METRICS), torch.device(DEVICE))
    for name in METRICS:
        torch.testing.assert_close(
            torch.tensor(found[name].per_frame), torch.tensor(expected[name].per_frame), equal_nan=True
        )
    monkeypatch.setattr(scores_module, "_FRAMES_PER_CHUNK", size)
    assert score_video(x, y)["flicker"].worst_frame == expected["flicker"].worst_frame


def test_convolution_settings_are_put_back() -> None:
    before = torch.backends.cudnn.allow_tf32
    with exact_convolutions():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_one_frame_has_no_flicker() -> None:
    frame = video(1, 3, 40, 40)
    assert applicable_metrics(1, 40, 40) == ["psnr", "ssim", "lpips"] == list(score_video(frame, frame))
    with pytest.raises(InputError, match="flicker needs at least 2 frames; the video has 1"):
        score_video(frame, frame, ["flicker"])


@pytest.mark.parametrize(
    ("name", "words"), [("vmaf", "metric is 'vmaf'; choose from psnr"), ("lpips", "LPIPS needs at least 31 pixels")]
)
def test_metrics_without_meaning_are_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_metrics([name], 2, 20, 64)


def test_json_has_no_infinity() -> None:
    content = FrameScores((float("inf"), 30.0, float("nan"))).to_json()
    assert content["per_frame"] == [None, 30.0, None]
    assert content["worst_frame"] == 1
    json.dumps(content, allow_nan=False)
    assert FrameScores((float("nan"), 1.0, 3.0), higher_is_better=False).to_json()["worst_frame"] == 2


@pytest.mark.parametrize("name", list(METRICS))
def test_shapes_must_agree(name: str) -> None:
    function = METRICS[name].function  # type: ignore[index]
    with pytest.raises(ValueError, match=r"\[2, 3, 16, 16\] and \[2, 3, 16, 18\]"):
        function(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 18))
