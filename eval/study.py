"""A study: dense and draft videos of one model, over prompts, seeds and settings, in a folder that can be resumed.

```
study.json                 what is compared, on what; prompts, seeds and settings are only ever appended to
runs/dense-P-S.json        a dense run of prompt number P and seed number S: times
runs/SETTING-P-S.json      a draft run: times, density by layer and step, every metric on every frame
frames/dense-P-S.mkv       the dense frames without loss, so that a resumed study measures on decoded frames
videos/….mp4               for people
results.jsonl              one flat line for every draft run, made from runs/
```

A run's JSON is written last and whole: it is there if and only if the run is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.eval.environment import device_name, package_versions
from draftattn.eval.settings import setting_to_json
from draftattn.files import written_whole

FORMAT = 1
_SUBFOLDERS = ("runs", "frames", "videos")
_GROWING = ("prompts", "seeds", "settings")
# what folders have that were made before it was noted
NOTED_LATER = {"compiled": False}
_SETTINGS_NOTED_LATER = {"growth": 0.0}


@dataclass(frozen=True)
class Study:
    """What to compare.

    Args:
        model: folder or repository.
        prompts: what the videos show.
        seeds: seeds of the noise.
        settings: draft configs by name.
        height: pixels.
        width: pixels.
        num_frames: frames of a video.
        num_steps: denoising steps.
        guidance: guidance scale.
        dtype: precision of the weights.
        negative_prompt: what the videos should not show.
        image: first frame, for image-to-video models.
        fps: frames per second of the files.
        compiled: whether the transformer's blocks are compiled.
    """

    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, DraftConfig]
    height: int
    width: int
    num_frames: int
    num_steps: int
    guidance: float | None
    dtype: str
    negative_prompt: str | None = None
    image: str | None = None
    fps: int = 16
    compiled: bool = False

    def to_json(self, device: torch.device) -> dict[str, Any]:
        """The content of ``study.json``."""
        return {
            "format": FORMAT,
            "model": self.model,
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "fps": self.fps,
            "num_steps": self.num_steps,
            "guidance": self.guidance,
            "negative_prompt": self.negative_prompt,
            "image": self.image,
            "dtype": self.dtype,
            "compiled": self.compiled,
            "device": device_name(device),
            "versions": package_versions(),
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "settings": [setting_to_json(name, config) for name, config in self.settings.items()],
        }


@dataclass(frozen=True)
class Run:
    """One video of a study.

    Args:
        setting: name of the setting; None for the dense video.
        prompt: number of the prompt in ``study.json``.
        seed: number of the seed.
    """

    setting: str | None
    prompt: int
    seed: int

    @property
    def name(self) -> str:
        """The name its files share."""
        return f"{self.setting or 'dense'}-{self.prompt}-{self.seed}"

    @property
    def dense(self) -> Run:
        """The dense run it is compared with."""
        return Run(None, self.prompt, self.seed)


class StudyFolder:
    """The files of a study. See the module for what they are."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content

    @classmethod
    def open(cls, path: Path, study: Study, device: torch.device, *, first: bool = True) -> StudyFolder:
        """Makes the folder, or takes up the study in it and adds prompts, seeds and settings that are new.

        Args:
            path: the folder.
            study: what it is to hold.
            device: where its videos are made.
            first: of several processes that open it for the same study, whether this one comes before all others;
                they take what it left.

        Raises:
            InputError: if the folder cannot be written or holds a study of something else; names what differs.
        """
        content = study.to_json(device)
        file = path / "study.json"
        if file.is_file():
            content = _merged(path, _read_json(file), content)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"study folder {str(path)!r} holds something else; give a new or empty folder")
        if not first:
            return cls(path, content)
        try:
            for name in _SUBFOLDERS:
                (path / name).mkdir(parents=True, exist_ok=True)
                _remove_leftovers(path / name)
            _remove_leftovers(path)
            write_json(file, content)
        except OSError as error:
            raise InputError(f"study folder {str(path)!r} cannot be written: {error.strerror}") from error
        return cls(path, content)

    def runs_of(self, study: Study) -> list[Run]:
        """All runs a study asks for: of each seed and prompt the dense one, then every setting."""
        prompts, seeds = self.content["prompts"], self.content["seeds"]
        return [
            Run(setting, prompts.index(prompt), seeds.index(seed))
            for seed in study.seeds
            for prompt in study.prompts
            for setting in (None, *study.settings)
        ]

    def outstanding(self, study: Study) -> list[Run]:
        """The runs still to be made; a dense one again where its frames are gone and a draft run needs them."""
        missing = [run for run in self.runs_of(study) if not self.is_complete(run)]
        needed = {run.dense for run in missing if run.setting is not None}
        remake = {run for run in needed if self.is_complete(run) and not self.frames_file(run).is_file()}
        return [run for run in self.runs_of(study) if run in remake or run in missing]

    def is_complete(self, run: Run) -> bool:
        """Whether a run was made."""
        return self.run_file(run).is_file()

    def run_file(self, run: Run) -> Path:
        """Where a run's figures are."""
        return self.path / "runs" / f"{run.name}.json"

    def video_file(self, run: Run) -> Path:
        """Where a run's video is."""
        return self.path / "videos" / f"{run.name}.mp4"

    def frames_file(self, run: Run) -> Path:
        """Where the frames of a dense run are."""
        return self.path / "frames" / f"{run.name}.mkv"

    def read(self, run: Run) -> dict[str, Any]:
        """The figures of a complete run."""
        return _read_json(self.run_file(run))

    def write(self, run: Run, figures: dict[str, Any]) -> None:
        """Notes a run as complete."""
        kind: dict[str, Any] = {"kind": "dense"} if run.setting is None else {"kind": "draft", "setting": run.setting}
        file = self.video_file(run)
        video = {"video": file.relative_to(self.path).as_posix()} if file.is_file() else {}
        write_json(self.run_file(run), {**kind, "prompt": run.prompt, "seed": run.seed, **figures, **video})

    def row(self, run: Run) -> dict[str, Any]:
        """The line of a complete draft run in ``results.jsonl``: everything but lists, without nesting."""
        setting = next(setting for setting in self.content["settings"] if setting["name"] == run.setting)
        options = [(key, value) for key, value in setting.items() if key != "name"]
        figures = self.read(run)
        return {
            "setting": run.setting,
            "prompt": run.prompt,
            "seed": run.seed,
            "prompt_text": self.content["prompts"][run.prompt],
            "seed_value": self.content["seeds"][run.seed],
            **{key: "x".join(map(str, value)) if isinstance(value, list) else value for key, value in options},
            **{key: value for key, value in _flat(figures) if key not in ("kind", "setting", "prompt", "seed")},
        }

    def rows(self) -> list[dict[str, Any]]:
        """The lines of all complete draft runs, in the order of settings, prompts and seeds."""
        runs = (
            Run(setting["name"], prompt, seed)
            for setting in self.content["settings"]
            for prompt in range(len(self.content["prompts"]))
            for seed in range(len(self.content["seeds"]))
        )
        return [self.row(run) for run in runs if self.is_complete(run)]

    def rows_of(self, study: Study) -> list[dict[str, Any]]:
        """The lines of the complete draft runs that a study asks for."""
        runs = [run for run in self.runs_of(study) if run.setting is not None]
        return [self.row(run) for run in runs if self.is_complete(run)]

    def write_results(self) -> None:
        """Makes ``results.jsonl`` anew from the runs."""
        _write(self.path / "results.jsonl", "".join(to_line(row) + "\n" for row in self.rows()))


def to_line(content: Any) -> str:
    """JSON on one line."""
    return json.dumps(content, allow_nan=False, ensure_ascii=False)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all, a line for every key.

    Raises:
        InputError: if it could not be written, as on a full disk.
    """
    lines = [f" {json.dumps(key)}: {to_line(value)}" for key, value in content.items()]
    _write(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _write(path: Path, text: str) -> None:
    try:
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"study file {str(path)!r} could not be written: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"study file {str(path)!r} cannot be read: {error}") from error
    assert isinstance(content, dict)
    return content


def _merged(path: Path, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    old = {**NOTED_LATER, **old}
    old["settings"] = [setting | {**_SETTINGS_NOTED_LATER, **setting} for setting in old["settings"]]
    differing = [key for key in new if key not in _GROWING and old.get(key) != new[key]]
    if differing:
        was = ", ".join(f"{key} {_shown(old.get(key), new[key])}" for key in differing)
        now = ", ".join(f"{_shown(new[key], old.get(key))}" for key in differing)
        raise InputError(f"study folder {str(path)!r} was made with {was}, and now it is {now}; use another folder")
    merged = dict(old)
    for key in _GROWING:
        merged[key] = old[key] + [entry for entry in new[key] if entry not in old[key]]
    names = [setting["name"] for setting in merged["settings"]]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"study folder {str(path)!r} has another setting named {name!r}; use another folder")
    return merged


def _shown(value: object, other: object) -> str:
    """A value for a message; of dictionaries only what differs from the other's."""
    if isinstance(value, dict) and isinstance(other, dict):
        return " ".join(f"{key} {value.get(key)}" for key in value.keys() | other if value.get(key) != other.get(key))
    return repr(value)


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, prefix if key == "metrics" else f"{prefix}{key}_")
        elif not isinstance(value, list):
            yield prefix + key, value


def _remove_leftovers(folder: Path) -> None:
    """Removes what a killed run was writing, see `written_whole`."""
    for file in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.\d+\.\w+", file.name):
            file.unlink(missing_ok=True)
