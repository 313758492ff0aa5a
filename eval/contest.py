"""A contest of mask policies: each at the same densities, then compared at the same density and at the same time.

```
measured.json     what was matched, recalled and timed so far; a stopped contest continues from it
study/            the videos' figures, see `draftattn.eval.study`
contest.json      every figure, written anew at the end
```
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.eval.contest_calls import CapturedCall, capture_calls, match_density, mean_density, seconds_of
from draftattn.eval.contest_tables import at_equal_time
from draftattn.eval.recall import mean_figures
from draftattn.eval.recall_probe import probe_run
from draftattn.eval.run_study import Listener
from draftattn.eval.settings import setting_name, setting_to_json
from draftattn.eval.study import NOTED_LATER, Study, StudyFolder, write_json
from draftattn.eval.summary import summarise
from draftattn.policies import make_policy, policy_text, read_policy
from draftattn.policy import ObservingPolicy

SCHEMA = 1
QUALITY = ("psnr", "ssim", "lpips", "flicker")
_SIDES = ("height", "width", "num_frames")


@dataclass(frozen=True)
class Contest:
    """What is compared.

    Args:
        contenders: configs by name; sparsity and warm-up are set by the contest.
        densities: shares of scores to compute, matched by each contender as near as it can.
        warmups: shares of leading dense steps.
        study: prompts, seeds, size and steps; its settings are not looked at.
        layers: layers whose recall, error and time are measured.
        steps: denoising steps of these.
        recall_prompts: of how many prompts, each with the first seed.
        time_size: height, width and frames of a larger video whose attention is timed too, at the densities that the
            contenders have at the size of the videos; None times at that size only.
    """

    contenders: dict[str, DraftConfig]
    densities: tuple[float, ...]
    warmups: tuple[float, ...]
    study: Study
    layers: tuple[int, ...]
    steps: tuple[int, ...]
    recall_prompts: int = 2
    time_size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for density in self.densities:
            if not 0 < density <= 1:
                raise InputError(f"densities holds {density}; a share of scores is in (0, 1]")
        for warmup in self.warmups:
            if not 0 <= warmup < 1:
                raise InputError(f"warmups holds {warmup}; a share of steps is in [0, 1)")
        if not self.contenders or not self.densities or not self.warmups:
            raise InputError("a contest needs at least one policy, one density and one warm-up")
        if self.recall_prompts < 1:
            raise InputError(f"recall-prompts is {self.recall_prompts}; it must be at least 1")

    @property
    def size(self) -> dict[str, int]:
        """Height, width and frames, as a pipeline takes them."""
        return {name: getattr(self.study, name) for name in _SIDES}

    @property
    def large_size(self) -> dict[str, int]:
        """The same of the larger video."""
        assert self.time_size is not None
        return dict(zip(_SIDES, self.time_size, strict=True))


@dataclass
class _Entry:
    """A contender at one density and warm-up."""

    contender: str
    target: float
    warmup: float
    config: DraftConfig
    density: float
    setting: str = field(init=False)
    alike: str = field(init=False)

    def __post_init__(self) -> None:
        self.setting = setting_name(self.config)
        # only a policy that watches dense steps, and a sparsity that grows after them, tell how many there were
        tells = isinstance(make_policy(self.config), ObservingPolicy) or self.config.growth > 0
        self.alike = self.setting if tells else setting_name(replace(self.config, warmup=0))


def measure_contest(
    contest: Contest,
    path: Path,
    load: Callable[[], Any],
    device: torch.device,
    listener: Listener | None = None,
) -> Study:
    """Does what needs no videos, as far as it is not yet there; may be stopped at any moment.

    A dense run is looked at: each contender's parameter is found that gives the densities, recall and error of the
    attention output are measured at chosen layers and steps, and the time of mask and attention on the same tensors.

    Args:
        contest: what to compare.
        path: folder.
        load: gives the pipeline; called only if something is left to do.
        device: where it runs.
        listener: told of progress.

    Returns:
        The videos to make, in the folder ``study`` of ``path``.

    Raises:
        InputError: if the folder holds something else.
    """
    listener = listener or Listener()
    pipe = functools.cache(load)
    measured = _Measured(path / "measured.json", contest, device)
    calls = functools.cache(lambda: _captured(contest, pipe(), contest.size, listener))
    entries = _matched(contest, measured, calls, listener)
    _recall(contest, entries, measured, pipe, listener)
    settings = {entry.alike: entry.config for entry in entries}
    _times(contest, settings, measured, "seconds", calls, device, listener)
    calls.cache_clear()
    if contest.time_size is not None:
        large = functools.cache(lambda: _captured(contest, pipe(), contest.large_size, listener))
        at_large = {
            entry.alike: match_density(entry.config, entry.density, large())
            for entry in entries
            if entry.alike not in measured["large_seconds"]
        }
        _times(contest, at_large, measured, "large_seconds", large, device, listener)
        large.cache_clear()
    return _study_of(contest, entries)


def write_contest(contest: Contest, path: Path, device: torch.device) -> dict[str, Any]:
    """Brings the figures of a contest together whose measurements and videos are complete.

    Returns:
        The content of ``contest.json``, which is written.
    """
    measured = _Measured(path / "measured.json", contest, device)
    entries = _matched(contest, measured, list, Listener())
    study = _study_of(contest, entries)
    result = _result(contest, entries, measured, StudyFolder.open(path / "study", study, device), study)
    write_json(path / "contest.json", result)
    return result


def _study_of(contest: Contest, entries: list[_Entry]) -> Study:
    return replace(contest.study, settings={entry.setting: entry.config for entry in entries})


class _Measured:
    """The figures that are not of videos, kept in a file as they come."""

    def __init__(self, file: Path, contest: Contest, device: torch.device) -> None:
        self._file = file
        study = contest.study.to_json(device)
        about = {key: value for key, value in study.items() if key not in ("prompts", "seeds", "settings")}
        about |= {
            "first_prompt": contest.study.prompts[0],
            "first_seed": contest.study.seeds[0],
            "layers": list(contest.layers),
            "steps": list(contest.steps),
            "recall_prompts": contest.recall_prompts,
            "time_size": None if contest.time_size is None else list(contest.time_size),
        }
        kinds = ("parameters", "recall", "seconds", "large_seconds")
        self.content: dict[str, Any] = {"about": about} | {kind: {} for kind in kinds}
        if file.is_file():
            try:
                self.content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"contest file {str(file)!r} cannot be read: {error}") from error
            was = {**NOTED_LATER, **self.content.get("about", {})}
            differing = [key for key in about if was.get(key) != about[key]]
            if differing:
                raise InputError(
                    f"contest folder {str(file.parent)!r} was made with another {', '.join(differing)}; "
                    "use another folder"
                )

    def __getitem__(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.content[name]
        return found

    def save(self) -> None:
        """Writes all that is known so far."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, self.content)


def _captured(contest: Contest, pipe: Any, size: dict[str, int], listener: Listener) -> list[CapturedCall]:
    listener.phase("a dense run of " + "×".join(map(str, size.values())) + ", whose attention is looked at")
    arguments = _arguments(contest, 0) | size
    return capture_calls(pipe, contest.layers, contest.steps, on_step=listener.step, **arguments)


def _matched(
    contest: Contest, measured: _Measured, calls: Callable[[], list[CapturedCall]], listener: Listener
) -> list[_Entry]:
    """Every contender at every density and warm-up."""
    entries = []
    for name, base in contest.contenders.items():
        for target in contest.densities:
            key = f"{name} {setting_name(replace(base, sparsity=0.0, warmup=0))} {target:g}"
            if key not in measured["parameters"]:
                listener.phase(f"matching {name} to density {target:g}")
                config = match_density(base, target, calls())
                measured["parameters"][key] = {
                    "sparsity": config.sparsity,
                    "policy": policy_text(config.policy),
                    "density": round(mean_density(config, calls()), 5),
                }
                measured.save()
            found = measured["parameters"][key]
            config = replace(base, sparsity=found["sparsity"], policy=read_policy(found["policy"]))
            made = [replace(config, warmup=warmup) for warmup in contest.warmups]
            entries += [_Entry(name, target, each.warmup, each, found["density"]) for each in made]
    return entries


def _recall(
    contest: Contest, entries: list[_Entry], measured: _Measured, pipe: Callable[[], Any], listener: Listener
) -> None:
    missing = {entry.alike: entry.config for entry in entries if entry.alike not in measured["recall"]}
    if not missing:
        return
    rows: list[dict[str, Any]] = []
    prompts = contest.study.prompts[: contest.recall_prompts]
    for number in range(len(prompts)):
        listener.phase(f"recall and error of {len(missing)} settings, prompt {number + 1} of {len(prompts)}")
        probe_run(
            pipe(),
            missing,
            layers=contest.layers,
            steps=contest.steps,
            on_row=rows.append,
            on_step=listener.step,
            bounds=False,
            **_arguments(contest, number),
        )
    for figures in mean_figures(rows):
        residual = missing[figures["setting"]].residual
        measured["recall"][figures["setting"]] = {
            "calls": figures["calls"],
            "density": round(figures["density"], 5),
            "recall": round(figures["recall"], 5),
            "error": round(figures["error_residual" if residual else "error"], 5),
        }
    measured.save()


def _times(
    contest: Contest,
    settings: dict[str, DraftConfig],
    measured: _Measured,
    kind: str,
    calls: Callable[[], list[CapturedCall]],
    device: torch.device,
    listener: Listener,
) -> None:
    missing: dict[str, DraftConfig | None] = {"dense": None, **settings}
    missing = {name: config for name, config in missing.items() if name not in measured[kind]}
    for number, (name, config) in enumerate(missing.items(), 1):
        listener.phase(f"timing {number}/{len(missing)} {name}")
        measured[kind][name] = float(f"{seconds_of(config, calls(), contest.study.num_steps, device):.5g}")
    if missing:
        measured.save()


def _arguments(contest: Contest, prompt: int) -> dict[str, Any]:
    """What a run of a prompt with the first seed takes."""
    study = contest.study
    given = {"guidance_scale": study.guidance, "negative_prompt": study.negative_prompt}
    return {
        "seed": study.seeds[0],
        "prompt": study.prompts[prompt],
        "num_inference_steps": study.num_steps,
        **contest.size,
        **{name: value for name, value in given.items() if value is not None},
    }


def _result(
    contest: Contest, entries: list[_Entry], measured: _Measured, folder: StudyFolder, study: Study
) -> dict[str, Any]:
    summaries = {summary["setting"]: summary for summary in summarise(folder.rows_of(study))}
    kinds = ("seconds",) if contest.time_size is None else ("seconds", "large_seconds")
    rows = []
    for entry in entries:
        summary = summaries[entry.setting]
        rows.append(
            {
                "contender": entry.contender,
                "target_density": entry.target,
                "warmup": entry.warmup,
                "videos": summary["videos"],
                "density": round(summary["density"], 5),
                "recall": measured["recall"][entry.alike]["recall"],
                "error": measured["recall"][entry.alike]["error"],
                **{kind: measured[kind][entry.alike] for kind in kinds},
                "step_seconds": round(summary["step_seconds"], 6),
                **{name: _finite(summary[name]) for name in QUALITY if name in summary},
                "setting": setting_to_json(entry.setting, entry.config),
            }
        )
    return {
        "schema": SCHEMA,
        **measured["about"],
        "prompts": list(contest.study.prompts),
        "seeds": list(contest.study.seeds),
        **{f"dense_{kind}": measured[kind]["dense"] for kind in kinds},
        "rows": rows,
        "equal_time": [entry for kind in kinds for entry in at_equal_time(rows, contest.contenders, kind)],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity; None stands for it."""
    return None if value == float("inf") else round(value, 5)


def spread_steps(num_steps: int, warmups: Sequence[float]) -> tuple[int, ...]:
    """Three steps that are sparse with every warm-up, evenly spread over the rest of a run.

    >>> spread_steps(20, [0, 0.25])
    (5, 12, 19)
    """
    first = max(DraftConfig(warmup=float(warmup)).num_warmup_steps(num_steps) for warmup in warmups)
    first = min(first, num_steps - 1)
    return tuple(sorted({first, (first + num_steps - 1) // 2, num_steps - 1}))
