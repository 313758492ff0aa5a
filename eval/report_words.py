"""What the report says in words: names of settings, headline, summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from draftattn.eval.page import term, text

Values = Mapping[str, Any]


def setting_labels(settings: Sequence[Values]) -> list[str]:
    """A short name for each setting: its sparsity, and what else differs between the settings.

    >>> setting_labels([{"name": "a", "sparsity": 0.75, "warmup": 0.25}, {"name": "b", "sparsity": 0.9, "warmup": 5}])
    ['75 % sparsity, warm-up 25 %', '90 % sparsity, warm-up 5 steps']
    """
    keys = [key for key in dict.fromkeys(key for setting in settings for key in setting) if key != "name"]
    varying = [key for key in keys if len({repr(setting.get(key)) for setting in settings}) > 1]
    labels = []
    for setting in settings:
        shown = [key for key in keys if key in setting and (key in varying or key == "sparsity")]
        shown.sort(key=lambda key: key != "sparsity")
        labels.append(", ".join(describe(key, setting[key]) for key in shown) or setting["name"])
    return [
        f"{label} ({setting['name']})" if labels.count(label) > 1 else label
        for label, setting in zip(labels, settings, strict=True)
    ]


def describe(key: str, value: Any) -> str:
    """One setting in words.

    >>> describe("selection", "row"), describe("residual", False), describe("tile", [1, 8, 16])
    ('per row', 'no residual', 'tile 1×8×16')
    """
    match key, value:
        case "sparsity", int() | float():
            return f"{value * 100:g} % sparsity"
        case "warmup", _:
            return "no warm-up" if value == 0 else f"warm-up {plain(key, value)}"
        case "selection", str():
            return f"per {value}"
        case "residual", bool():
            return "residual" if value else "no residual"
        case "policy", str():
            return value
        case "tile", _:
            return f"tile {plain(key, value)}"
        case _:
            return f"{key.replace('_', ' ')} {plain(key, value)}"


def plain(key: str, value: Any) -> str:
    """A setting's value as a table shows it.

    >>> plain("warmup", 0.25), plain("warmup", 5), plain("tile", "auto"), plain("residual", True)
    ('25 %', '5 steps', 'auto', 'yes')
    """
    match key, value:
        case _, bool():
            return "yes" if value else "no"
        case ("sparsity", int() | float()) | ("warmup", float()):
            return f"{value * 100:g} %"
        case "warmup", int():
            return f"{value} step{'' if value == 1 else 's'}"
        case (("tile" | "block_shape"), list() | tuple()):
            return "×".join(map(str, value))
        case _, list() | tuple():
            return ", ".join(map(str, value)) or "none"
        case _, None:
            return "none"
        case _:
            return str(value)


def speed_words(speedups: Sequence[float], what: str) -> str:
    """How much faster something is.

    >>> speed_words([1.392], "per step"), speed_words([1.25, 1.6], "per step"), speed_words([0.9], "per step")
    ('1.39× faster per step', '1.25 to 1.60× faster per step', '1.11× slower per step')
    """
    low, high = min(speedups), max(speedups)
    if high - low >= 0.01:
        if low >= 1:
            return f"{low:.2f} to {high:.2f}× faster {what}"
        return f"{low:.2f} to {high:.2f}× the speed of dense {what}"
    middle = fmean(speedups)
    if 0.995 <= middle < 1.005:
        return f"as fast {what}"
    return f"{middle:.2f}× faster {what}" if middle > 1 else f"{1 / middle:.2f}× slower {what}"


def headline(settings: Sequence[Values]) -> str:
    """The result in one line: speed and closeness of all settings that have videos."""
    speedups = [setting["values"]["speedup"] for setting in settings if setting["values"].get("speedup") is not None]
    words = [speed_words(speedups, "per step")] if speedups else []
    psnrs = [setting["values"]["psnr"] for setting in settings if "psnr" in setting["values"]]
    finite = [psnr for psnr in psnrs if psnr is not None]
    if psnrs and not finite:
        words.append("identical to dense")
    elif finite:
        low, high = min(finite), max(finite)
        spread = f"{low:.1f}" if high - low < 0.05 else f"{low:.1f} to {high:.1f}"
        words.append(f"PSNR {spread} dB")
    line = ", ".join(words) or "dense and draft attention compared"
    return line[0].upper() + line[1:]


def overview(study: Values, settings: Sequence[Values], num_runs: int, num_expected: int) -> str:
    """What was compared, on what, and which settings stand out, as HTML."""
    prompts, seeds = len(study["prompts"]), len(study["seeds"])
    words = [
        f"{_count(len(settings), 'setting')} against dense attention on {_count(prompts, 'prompt')}"
        f"{f' × {seeds} seeds' if seeds > 1 else ''}: {study['width']}×{study['height']} pixels, "
        f"{study['num_frames']} frames, {study['num_steps']} denoising steps, on {study['device']}."
    ]
    if num_runs < num_expected:
        words.append(f"The study is unfinished: {num_runs} of {num_expected} draft videos so far.")
    fast = [setting for setting in settings if setting["values"].get("speedup") is not None]
    close = [setting for setting in settings if setting["values"].get("psnr") is not None]
    if len(settings) > 1 and fast and close:
        fastest = max(fast, key=lambda setting: setting["values"]["speedup"])
        closest = max(close, key=lambda setting: setting["values"]["psnr"])
        if fastest is closest:
            words.append(f"{_start(fastest['label'])} is both the fastest and the closest to dense.")
        else:
            words.append(
                f"Fastest is {fastest['label']} ({fastest['values']['speedup']:.2f}×), closest to dense "
                f"{closest['label']} ({closest['values']['psnr']:.1f} dB)."
            )
    return text(" ".join(words))


def lede(setting: Values, study: Values) -> str:
    """What one setting does to time and quality, as HTML."""
    values = setting["values"]
    sentences = []
    if values.get("speedup") is not None:
        step = f"<b>{text(speed_words([values['speedup']], 'per step'))}</b>"
        seconds = ""
        if values.get("dense_step_seconds") is not None and values.get("step_seconds") is not None:
            seconds = f" ({_seconds(values['step_seconds'])} instead of {_seconds(values['dense_step_seconds'])})"
        run = ""
        if values.get("run_speedup") is not None:
            run = f" and {text(speed_words([values['run_speedup']], 'for the whole run'))}"
        sentences.append(f"{text(_start(setting['label']))}: {step}{seconds}{run}.")
    else:
        sentences.append(f"{text(_start(setting['label']))}.")
    scores = []
    for key, name, digits, unit in (("psnr", "PSNR", 1, " dB"), ("ssim", "SSIM", 3, ""), ("lpips", "LPIPS", 3, "")):
        if key in values:
            value = "without limit" if values[key] is None else f"{values[key]:.{digits}f}{unit}"
            scores.append(f"{term(key, name)} <b>{value}</b>")
    if "psnr" in values and values["psnr"] is None:
        sentences.append("Its frames are identical to those of dense attention.")
    elif scores:
        several = setting["num_runs"] > 1
        dense = (
            f"{setting['num_runs']} dense videos of the same prompts" if several else "dense video of the same prompt"
        )
        sentences.append(f"Against the {dense} and noise: {', '.join(scores)}.")
    worst = setting["worst"].get("psnr")
    if worst is not None and worst["value"] is not None:
        run = worst["source"]
        where = f"“{text(study['prompts'][run['prompt']])}”, seed {text(study['seeds'][run['seed']])}"
        sentences.append(
            f"The {term('worst', 'worst frame')} is frame {worst['frame'] + 1} of {where}, at {worst['value']:.1f} dB."
        )
    return " ".join(sentences)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _start(words: str) -> str:
    return words[:1].upper() + words[1:]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"
