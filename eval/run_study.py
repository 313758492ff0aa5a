"""Making the videos of a study and measuring them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftattn.config import DraftConfig
from draftattn.eval.frames import load_frames, save_frames, to_bytes
from draftattn.eval.generation import Generation, generate
from draftattn.eval.loading import read_image
from draftattn.eval.metrics import score_video
from draftattn.eval.study import Run, Study, StudyFolder
from draftattn.eval.video import save_video
from draftattn.pipelines.video import disable, enable
from draftattn.pipelines.video.stats import DraftStats

_SECONDS_BETWEEN_WRITINGS = 20


@dataclass
class Listener:
    """What to tell while a study runs.

    Args:
        phase: told what is being done.
        step: called after every denoising step.
        result: given the line of every draft run that is complete.
    """

    phase: Callable[[str], None] = lambda what: None
    step: Callable[[], None] = lambda: None
    result: Callable[[dict[str, Any]], None] = lambda row: None


def run_study(
    folder: StudyFolder,
    study: Study,
    load: Callable[[], Any],
    device: torch.device,
    listener: Listener | None = None,
    *,
    keep_videos: bool = True,
    mine: Callable[[Run], bool] = lambda run: True,
) -> None:
    """Makes the runs of a study that are not complete yet, one after another; may be stopped at any moment.

    Times are those of the run that made them. On a GPU, or with compiled blocks, an untimed step of each setting comes
    first, so that no figure holds the time of compiling.

    Args:
        folder: where the study is kept.
        study: what to make.
        load: gives the pipeline; called only if something is left to do.
        device: where it runs.
        listener: told of progress.
        keep_videos: whether the videos are written; without them there is no report.
        mine: which runs to make, where several processes share them; a dense run and those compared with it belong
            together.
    """
    listener = listener or Listener()
    outstanding = [run for run in folder.outstanding(study) if mine(run)]
    if outstanding:
        listener.phase("loading the model")
        pipe = load()
        with _quiet(pipe):
            _Maker(folder, study, pipe, device, listener, keep_videos).make_all(outstanding)
    folder.write_results()


class _Maker:
    """Makes runs with a loaded pipeline."""

    def __init__(
        self,
        folder: StudyFolder,
        study: Study,
        pipe: Any,
        device: torch.device,
        listener: Listener,
        keep_videos: bool,
    ) -> None:
        self.folder, self.study, self.pipe, self.device, self.listener = folder, study, pipe, device, listener
        self.keep_videos = keep_videos
        self.warmed: set[str | None] = set()
        self.next_writing = 0.0
        # The dense frames of the latest prompt and seed, read back from disk if they were made earlier.
        self.dense_frames: tuple[Run, Tensor] | None = None
        self.arguments: dict[str, Any] = {
            "height": study.height,
            "width": study.width,
            "num_frames": study.num_frames,
            "num_inference_steps": study.num_steps,
        }
        if study.guidance is not None:
            self.arguments["guidance_scale"] = study.guidance
        if study.negative_prompt is not None:
            self.arguments["negative_prompt"] = study.negative_prompt
        if study.image is not None:
            self.arguments["image"] = read_image(Path(study.image), study.width, study.height)

    def make_all(self, runs: list[Run]) -> None:
        """Makes the runs in their order."""
        for number, run in enumerate(runs, 1):
            self.listener.phase(f"{number}/{len(runs)} {run.name}")
            compiles = self.device.type == "cuda" or self.study.compiled
            if compiles and run.setting not in self.warmed:
                self._warm_up(run)
            if run.setting is None:
                self._make_dense(run)
            else:
                self._make_draft(run, self.study.settings[run.setting])
                self.listener.result(self.folder.row(run))
                self._write_results()

    def _write_results(self) -> None:
        """Now and then: it reads every run there is."""
        if time.monotonic() >= self.next_writing:
            self.folder.write_results()
            self.next_writing = time.monotonic() + _SECONDS_BETWEEN_WRITINGS

    def _warm_up(self, run: Run) -> None:
        """One untimed sparse step, or one dense step with decoding."""
        self.warmed.add(run.setting)
        prompt = self.folder.content["prompts"][run.prompt]
        arguments = {**self.arguments, "prompt": prompt, "num_inference_steps": 1}
        disable(self.pipe)
        if run.setting is None:
            self.pipe(**arguments, output_type="pt")
        else:
            with enable(self.pipe, replace(self.study.settings[run.setting], warmup=0)):
                self.pipe(**arguments, output_type="latent")

    def _make_dense(self, run: Run) -> None:
        disable(self.pipe)
        dense = self._generate(run)
        frames = to_bytes(dense.video)
        save_frames(self.folder.frames_file(run), frames, self.study.fps)
        self._save_video(run, frames)
        self.dense_frames = run, frames
        self.folder.write(run, times(dense))

    def _make_draft(self, run: Run, config: DraftConfig) -> None:
        with enable(self.pipe, config) as handle:
            draft = self._generate(run)
            stats = handle.stats()
        frames = to_bytes(draft.video)
        self._save_video(run, frames)
        scores = score_video(frames, self._dense_frames(run.dense), device=self.device)
        dense = self.folder.read(run.dense)
        warmup = config.num_warmup_steps(len(draft.step_seconds))
        figures = times(draft, warmup)
        self.folder.write(
            run,
            {
                "density": round(stats.density, 5),
                "run_density": round(stats.run_density, 5),
                "density_by_layer_step": density_by_layer_step(stats),
                "warmup_steps": warmup,
                **figures,
                "mask_seconds": round(stats.mask_seconds, 5),
                "dense_step_seconds": dense["step_seconds"],
                "dense_total_seconds": dense["total_seconds"],
                "speedup": round(dense["step_seconds"] / figures["step_seconds"], 4),
                "run_speedup": round(dense["total_seconds"] / figures["total_seconds"], 4),
                "metrics": {name: score.to_json() for name, score in scores.items()},
            },
        )

    def _generate(self, run: Run) -> Generation:
        prompts, seeds = self.folder.content["prompts"], self.folder.content["seeds"]
        return generate(
            self.pipe,
            seed=seeds[run.seed],
            prompt=prompts[run.prompt],
            on_step=self.listener.step,
            **self.arguments,
        )

    def _save_video(self, run: Run, frames: Tensor) -> None:
        if self.keep_videos:
            save_video(self.folder.video_file(run), frames.float() / 255, self.study.fps)

    def _dense_frames(self, run: Run) -> Tensor:
        if self.dense_frames is None or self.dense_frames[0] != run:
            self.dense_frames = run, load_frames(self.folder.frames_file(run))
        return self.dense_frames[1]


def times(generation: Generation, first_step: int = 0) -> dict[str, Any]:
    """The times of a generation as JSON holds them; ``step_seconds`` is the median from ``first_step`` on."""
    return {
        "step_seconds": round(generation.median_step(first_step), 6),
        "all_step_seconds": [round(seconds, 6) for seconds in generation.step_seconds],
        "decode_seconds": round(generation.decode_seconds, 5),
        "total_seconds": round(generation.seconds, 5),
    }


def density_by_layer_step(stats: DraftStats) -> dict[str, list[Any]]:
    """Realised density of every layer (rows) in every step (columns), mean over guidance branches; dense is 1."""
    cells: dict[tuple[int, int], list[float]] = {}
    for call in stats.calls:
        if call.step is not None:
            cells.setdefault((call.layer, call.step), []).append(call.density)
    layers = sorted({layer for layer, _ in cells})
    steps = sorted({step for _, step in cells})
    values = [
        [round(sum(cell) / len(cell), 5) if (cell := cells.get((layer, step))) else None for step in steps]
        for layer in layers
    ]
    return {"layers": layers, "steps": steps, "values": values}


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Keeps the pipeline's own progress bar away; the study shows one for all."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
