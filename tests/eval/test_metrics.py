import json

import pytest
import torch

from draftattn.eval.metrics import FrameScores, psnr, score_video, ssim


def test_psnr_of_known_error() -> None:
    reference = torch.rand(3, 3, 20, 30) * 0.5
    offset = torch.tensor([0.1, 0.01, 0.2]).view(3, 1, 1, 1)
    expected = -20 * offset.flatten().log10()
    torch.testing.assert_close(psnr(reference + offset, reference), expected, rtol=1e-4, atol=1e-4)


def test_identical_frames() -> None:
    video = torch.rand(2, 3, 16, 24)
    assert psnr(video, video).isinf().all()
    torch.testing.assert_close(ssim(video, video), torch.ones(2))


def test_scores_fall_with_noise() -> None:
    reference = torch.rand(2, 3, 32, 32)
    noise = torch.randn_like(reference)
    scores = [score_video((reference + level * noise).clamp(0, 1), reference) for level in (0.01, 0.05, 0.2)]
    for name in ("psnr", "ssim"):
        means = [score[name].mean for score in scores]
        assert means == sorted(means, reverse=True)


def test_only_the_changed_frame_is_worse() -> None:
    reference = torch.rand(4, 3, 16, 16)
    video = reference.clone()
    video[2] = 1 - video[2]
    score = score_video(video, reference)["ssim"]
    assert score.per_frame.index(score.worst) == 2


def test_json_has_no_infinity() -> None:
    content = FrameScores((float("inf"), 30.0)).to_json()
    assert content["per_frame"] == [None, 30.0]
    assert content["worst_frame"] == 1
    json.dumps(content, allow_nan=False)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, 16, 16\] and \[2, 3, 16, 18\]"):
        psnr(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 18))
