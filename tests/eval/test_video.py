from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from draftattn.errors import InputError
from draftattn.eval.video import save_video
from draftattn.files import check_writable, written_whole


@pytest.mark.parametrize(("height", "width"), [(64, 96), (50, 70)])
def test_video_comes_back(tmp_path: Path, height: int, width: int) -> None:
    ramp = torch.linspace(0.2, 0.8, 5)
    video = ramp.view(5, 1, 1, 1).expand(5, 3, height, width)
    path = tmp_path / "video.mp4"
    save_video(path, video, fps=8)
    frames = torch.from_numpy(np.stack(imageio.mimread(path))).float() / 255
    assert frames.shape == (5, height, width, 3)
    torch.testing.assert_close(frames.mean((1, 2, 3)), ramp, atol=0.02, rtol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def write_and_stop() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_and_stop()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_outputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        check_writable(tmp_path / "file" / "video.mp4")


def test_missing_folders_are_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "video.mp4")
    assert (tmp_path / "a" / "b").is_dir()


def test_truncated_video_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import draftattn.eval.video

    class Truncating:
        def __init__(self, path: Path, **options: object) -> None:
            self.path = path

        def __enter__(self) -> "Truncating":
            return self

        def __exit__(self, *error: object) -> None:
            Path(self.path).write_bytes(b"\0" * 1000)

        def append_data(self, frame: object) -> None:
            pass

    monkeypatch.setattr(draftattn.eval.video.imageio, "get_writer", Truncating)
    with pytest.raises(InputError, match="could not be written whole"):
        save_video(tmp_path / "video.mp4", torch.rand(3, 3, 32, 32), fps=8)
    assert not list(tmp_path.iterdir())
