"""The report of a study: one page with videos, curves, plot and table that opens from disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.eval.page import attachment, build_page, glossary, save_page, text
from draftattn.eval.report_words import headline, lede, overview, plain, setting_labels

Json = dict[str, Any]

METRICS: tuple[Json, ...] = (
    {"key": "psnr", "name": "PSNR", "unit": "dB", "digits": 1, "higher": True},
    {"key": "ssim", "name": "SSIM", "unit": "", "digits": 3, "higher": True, "most": 1},
    {"key": "lpips", "name": "LPIPS", "unit": "", "digits": 3, "higher": False, "least": 0},
    {"key": "flicker", "name": "Flicker", "unit": "", "digits": 2, "higher": False, "least": 0},
)
SPEEDS: tuple[Json, ...] = (
    {"key": "speedup", "name": "Step", "unit": "×", "digits": 2, "better": "higher"},
    {"key": "run_speedup", "name": "Whole run", "unit": "×", "digits": 2, "better": "higher"},
    {"key": "step_seconds", "name": "Step time", "unit": "s", "digits": 3, "better": "lower"},
    {"key": "density", "name": "Density", "unit": "", "digits": 3, "better": None},
)


@dataclass(frozen=True)
class Study:
    """A study as it lies in its folder; runs that are not complete are not in it.

    Args:
        folder: where it lies.
        info: ``study.json``.
        dense: the dense runs by prompt and seed.
        drafts: the draft runs whose dense run exists, in the order of settings, prompts and seeds.
    """

    folder: Path
    info: Json
    dense: dict[tuple[int, int], Json]
    drafts: list[Json]


def read_study(folder: Path) -> Study:
    """Reads the folder that ``draftattn compare`` leaves.

    Raises:
        InputError: if it holds no study, one of another format, a file that cannot be read, or no complete draft run.
    """
    if not (folder / "study.json").is_file():
        raise InputError(f"folder {str(folder)!r} holds no study.json; give one that draftattn compare made")
    info = _read_json(folder / "study.json")
    if info.get("format") != 1:
        raise InputError(f"study {str(folder)!r} has format {info.get('format')!r}; this version reads format 1")
    names = [setting["name"] for setting in info["settings"]]
    runs = [_read_json(path) for path in sorted((folder / "runs").glob("*.json"))]
    dense = {(run["prompt"], run["seed"]): run for run in runs if run["kind"] == "dense"}
    drafts = [
        run
        for run in runs
        if run["kind"] == "draft" and run["setting"] in names and (run["prompt"], run["seed"]) in dense
    ]
    drafts.sort(key=lambda run: (names.index(run["setting"]), run["prompt"], run["seed"]))
    if not drafts:
        raise InputError(f"study {str(folder)!r} holds no finished draft run yet; run draftattn compare again")
    return Study(folder, info, dense, drafts)


def write_report(folder: Path, *, embed_megabytes: float = 32) -> Path:
    """Writes ``report.html`` into the folder of a study, whole or not at all.

    The page needs no network and no other file, except for the videos that do not fit into ``embed_megabytes``: those
    are read from the folder beside it, and the page says so.

    Args:
        folder: a folder that ``draftattn compare`` made; it may be unfinished.
        embed_megabytes: how many megabytes of videos the page may hold.

    Returns:
        The path of the page.

    Raises:
        InputError: see `read_study`; also if the page cannot be written.
    """
    study = read_study(folder)
    if embed_megabytes < 0:
        raise InputError(f"embed_megabytes is {embed_megabytes!r}; it must be at least 0")
    data = page_data(study)
    chosen = data["runs"][data["chosen"]]
    videos, attachments = _place_videos(study, chosen, int(embed_megabytes * 1e6))
    data["videos"] = videos
    info = study.info
    expected = len(info["settings"]) * len(info["prompts"]) * len(info["seeds"])
    with_runs = [setting for setting in data["settings"] if setting["num_runs"]]
    title = headline(with_runs)
    slots = {
        "title": text(f"{title} · {info['model']}"),
        "model": text(info["model"]),
        "headline": text(title),
        "overview": overview(info, with_runs, len(study.drafts), expected),
        "lede": data["settings"][chosen["setting"]]["lede"],
        "video_note": text(_video_note(videos)),
        "settings_table": _settings_table(info["settings"], data["settings"]),
        "footer": text("Written by draftattn. Quality is measured on decoded frames, before the videos were encoded."),
        "attachments": "\n".join(attachments),
    }
    path = folder / "report.html"
    save_page(path, build_page("report.html", slots, data))
    return path


def page_data(study: Study) -> Json:
    """What the page's scripts read, all but the videos."""
    info = study.info
    names = [setting["name"] for setting in info["settings"]]
    runs = [_run_data(run, names, info["num_frames"], study.dense) for run in study.drafts]
    metrics = [metric for metric in METRICS if any(metric["key"] in run["values"] for run in runs)]
    settings = [
        _setting_data(label, [(i, run) for i, run in enumerate(runs) if run["setting"] == number], metrics)
        for number, label in enumerate(setting_labels(info["settings"]))
    ]
    for setting in settings:
        setting["lede"] = lede(setting, info) if setting["num_runs"] else ""
        for worst in setting["worst"].values():
            del worst["source"]
    columns = [speed for speed in SPEEDS if any(speed["key"] in run["values"] for run in runs)]
    for metric in metrics:
        better = "higher" if metric["higher"] else "lower"
        columns.append({**metric, "better": better})
        if metric["key"] == "psnr":
            columns.append({**metric, "key": "psnr_worst", "name": "worst", "better": better})
    return {
        **{key: info[key] for key in ("prompts", "seeds", "num_frames", "fps")},
        "settings": settings,
        "runs": runs,
        "dense": [{key: run[key] for key in ("prompt", "seed", "video")} for run in study.dense.values()],
        "chosen": _first_choice(info["settings"], runs),
        "metrics": [{**metric, "term": metric["key"]} for metric in metrics],
        "columns": [{**column, "term": "worst" if column["name"] == "worst" else column["key"]} for column in columns],
        "cards": _cards(columns),
        "facts": _facts(info),
        "versions": [[name, version or "not installed"] for name, version in info["versions"].items()],
        "glossary": glossary(),
    }


def _read_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"file {str(path)!r} holds no JSON object")
    return content


def _run_data(run: Json, names: list[str], num_frames: int, dense: dict[tuple[int, int], Json]) -> Json:
    values = {speed["key"]: run[speed["key"]] for speed in SPEEDS if run.get(speed["key"]) is not None}
    partner = dense[run["prompt"], run["seed"]]
    if partner.get("step_seconds") is not None:
        values["dense_step_seconds"] = partner["step_seconds"]
    curves, worst_frames = {}, {}
    for metric in METRICS:
        scores = run.get("metrics", {}).get(metric["key"])
        if not scores:
            continue
        key = metric["key"]
        # A measure of changes has a value less than there are frames; each stands at the later frame.
        missing = max(0, num_frames - len(scores["per_frame"]))
        values[key], values[f"{key}_worst"] = scores["mean"], scores["worst"]
        curves[key] = [_rounded(value) for value in [None] * missing + scores["per_frame"]]
        worst_frames[key] = scores["worst_frame"] + missing
    return {
        "setting": names.index(run["setting"]),
        **{key: run[key] for key in ("prompt", "seed", "video")},
        "values": values,
        "curves": curves,
        "worst_frames": worst_frames,
        "density_map": _density_map(run.get("density_by_layer_step")),
    }


def _density_map(densities: Json | None) -> Json | None:
    if not densities or not densities["layers"] or not densities["steps"]:
        return None
    return {**densities, "values": [[_rounded(value) for value in row] for row in densities["values"]]}


def _setting_data(label: str, runs: list[tuple[int, Json]], metrics: Sequence[Json]) -> Json:
    values: Json = {}
    for key in (*(speed["key"] for speed in SPEEDS), "dense_step_seconds"):
        found = [run["values"][key] for _, run in runs if key in run["values"]]
        if found:
            values[key] = fmean(found)
    worst: Json = {}
    for metric in metrics:
        key = metric["key"]
        scored = [(i, run) for i, run in runs if key in run["values"]]
        if not scored:
            continue
        # None is the infinite PSNR of identical frames: the mean is over the others, as no average holds it
        finite = [run["values"][key] for _, run in scored if run["values"][key] is not None]
        values[key] = fmean(finite) if finite else None
        ranked = [(i, run) for i, run in scored if run["values"][f"{key}_worst"] is not None]
        pick = min if metric["higher"] else max
        number, run = pick(ranked or scored, key=lambda item: item[1]["values"][f"{key}_worst"] or 0)
        values[f"{key}_worst"] = run["values"][f"{key}_worst"]
        worst[key] = {
            "value": values[f"{key}_worst"],
            "run": number,
            "frame": run["worst_frames"][key],
            "source": {"prompt": run["prompt"], "seed": run["seed"]},
        }
    return {
        "label": label,
        "short": label.replace(" sparsity", ""),
        "num_runs": len(runs),
        "values": values,
        "worst": worst,
    }


def _first_choice(settings: list[Json], runs: list[Json]) -> int:
    """The run to open with: of the default settings if they are there."""
    default = DraftConfig()

    def distance(setting: Json) -> int:
        same = ("sparsity", "warmup", "selection", "residual", "tile")
        return sum(key in setting and setting[key] != getattr(default, key) for key in same)

    best = min({run["setting"] for run in runs}, key=lambda number: (distance(settings[number]), number))
    return next(i for i, run in enumerate(runs) if run["setting"] == best)


def _cards(columns: Sequence[Json]) -> list[Json]:
    names = {"speedup": "Step", "run_speedup": "Whole run"}
    names |= {metric["key"]: metric["name"] for metric in METRICS}
    return [
        {**column, "term": column["key"], "name": names[column["key"]]} for column in columns if column["key"] in names
    ]


def _facts(info: Json) -> list[list[str]]:
    found = [
        ["Model", info["model"]],
        ["Size", f"{info['width']}×{info['height']} pixels, {info['num_frames']} frames"],
        ["Frames per second", info["fps"]],
        ["Denoising steps", info["num_steps"]],
        ["Guidance scale", "the pipeline's" if info.get("guidance") is None else info["guidance"]],
        ["Negative prompt", info.get("negative_prompt")],
        ["First frame", info.get("image")],
        ["Precision", info.get("dtype")],
        ["Blocks", "compiled" if info.get("compiled") else None],
        ["Device", info["device"]],
        ["Prompts", len(info["prompts"])],
        ["Seeds", ", ".join(map(str, info["seeds"]))],
    ]
    return [[name, str(value)] for name, value in found if value is not None]


def _settings_table(settings: list[Json], shown: list[Json]) -> str:
    keys = [key for key in dict.fromkeys(key for setting in settings for key in setting) if key != "name"]
    head = "".join(f"<th>{text(key.replace('_', ' '))}</th>" for key in ("setting", *keys))
    rows = "".join(
        f"<tr><th scope=row>{text(data['label'])}</th>"
        + "".join(f"<td>{text(plain(key, setting[key])) if key in setting else '–'}</td>" for key in keys)
        + "</tr>"
        for setting, data in zip(settings, shown, strict=True)
    )
    return f"<table class=plain><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _place_videos(study: Study, chosen: Json, budget: int) -> tuple[Json, list[str]]:
    """Where the page finds each video, and the script elements of those inside it."""

    def nearness(run: Json) -> tuple[bool, bool]:
        names = [setting["name"] for setting in study.info["settings"]]
        same_noise = (run["prompt"], run["seed"]) == (chosen["prompt"], chosen["seed"])
        return not same_noise, names.index(run["setting"]) != chosen["setting"]

    places: Json = {}
    attachments: list[str] = []
    for run in sorted(study.drafts, key=nearness):
        pair = [path for path in (study.dense[run["prompt"], run["seed"]]["video"], run["video"]) if path not in places]
        sizes = [(study.folder / path).stat().st_size if (study.folder / path).is_file() else None for path in pair]
        fits = None not in sizes and sum(size or 0 for size in sizes) <= budget
        for path in pair:
            if not fits:
                places[path] = {"href": quote(path)}
                continue
            content = (study.folder / path).read_bytes()
            budget -= len(content)
            places[path] = {"id": f"video-{len(attachments)}"}
            attachments.append(attachment(places[path]["id"], content))
    return places, attachments


def _video_note(videos: Json) -> str:
    linked = sum("href" in place for place in videos.values())
    if not linked:
        return "All videos are inside this page."
    if linked == len(videos):
        return "The videos are read from the folder beside this page; keep them together."
    return f"{len(videos) - linked} of {len(videos)} videos are inside this page; the others are read from beside it."


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
