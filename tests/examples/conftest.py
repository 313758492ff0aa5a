import importlib
import json
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest

# the examples are no part of the package: they are run from the repository
sys.path.insert(0, str(Path(__file__).parents[2]))
importlib.import_module("examples.tiny_wan")


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Two clips of 24 frames, and captions that hold a part of the first out."""
    folder = tmp_path_factory.mktemp("clips")
    for name, source in (("a.mp4", "testsrc"), ("b.mp4", "testsrc2")):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i"]
        subprocess.run([*command, f"{source}=size=160x120:rate=12:duration=2", str(folder / name)], check=True)
    first = [{"caption": "a clock", "end": 1.2}, {"caption": "a clock", "start": 1.25, "held_out": True}]
    entries = [
        {"file": "a.mp4", "source": "ffmpeg", "licence": "none", "scenes": first},
        {"file": "b.mp4", "source": "ffmpeg", "licence": "none", "scenes": [{"caption": "moving bars"}]},
    ]
    (folder / "clips.json").write_text(json.dumps({"clips": entries}))
    return folder


@pytest.fixture
def repository_assets():
    return Path(__file__).parents[2] / "assets"
