from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import torch

from draftattn.errors import InputError
from draftattn.eval.frames import load_frames, open_video, save_frames, to_bytes
from draftattn.eval.video import save_video


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(5, 3, 50, 70), (1, 3, 64, 96), (18, 3, 33, 31)])
def test_frames_come_back_without_loss(tmp_path: Path, shape: tuple[int, ...]) -> None:
    frames = noise(*shape)
    save_frames(tmp_path / "frames.mkv", frames)
    assert torch.equal(load_frames(tmp_path / "frames.mkv"), frames)
    assert [file.name for file in tmp_path.iterdir()] == ["frames.mkv"]


def test_to_bytes_is_what_files_show(tmp_path: Path) -> None:
    values = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0, 1.5])
    assert to_bytes(values).tolist() == [0, 0, 0, 1, 128, 255, 255]
    frames = noise(2, 3, 8, 8)
    assert torch.equal(to_bytes(frames.float() / 255), frames)


def test_video_is_read_in_chunks(tmp_path: Path) -> None:
    ramp = torch.linspace(0.2, 0.8, 7).view(7, 1, 1, 1).expand(7, 3, 32, 48)
    save_video(tmp_path / "video.mp4", ramp, fps=8)
    with open_video(tmp_path / "video.mp4") as video:
        assert (video.num_frames, video.height, video.width, video.fps) == (7, 32, 48, 8)
        chunks = list(video.chunks(3))
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(chunks).float().mean((1, 2, 3)) / 255, ramp[:, 0, 0, 0], atol=0.02, rtol=0)


def test_unreadable_videos_are_named_in_one_sentence(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name, words in (("text", "cannot be read"), ("empty", "cannot be read"), ("none", "is not a file")):
        with pytest.raises(InputError, match=words) as caught:
            load_frames(tmp_path / f"{name}.mp4")
        assert f"{name}.mp4" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_ffmpeg_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("No ffmpeg exe could be found.\nInstall ffmpeg on your system.")

    (tmp_path / "video.mp4").write_bytes(b"")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(InputError, match=r"video\.mp4.*cannot be read without ffmpeg: install imageio-ffmpeg"):
        load_frames(tmp_path / "video.mp4")


def test_half_written_frames_leave_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frames.mkv"
    save_frames(path, noise(2, 3, 16, 16))
    original = imageio_ffmpeg.write_frames

    class Full:
        """A disk that is full after one frame."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.writer = original(*arguments, **options)
            self.left = 2

        def send(self, frame: Any) -> None:
            if self.left:
                self.writer.send(frame)
                self.left -= 1

        def close(self) -> None:
            self.writer.close()

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", Full)
    with pytest.raises(InputError, match="could not be written whole"):
        save_frames(path, noise(5, 3, 16, 16))
    assert len(load_frames(path)) == 2
    assert list(tmp_path.iterdir()) == [path]
