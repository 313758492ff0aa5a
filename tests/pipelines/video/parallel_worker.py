"""One of the processes that `test_parallel` starts, as a launcher would: ``python parallel_worker.py FOLDER``."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import tiny_models as tiny
import torch
from diffusers import ContextParallelConfig
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from draftattn import InputError, TokenGrid, enable
from draftattn.cli import main as command_line
from draftattn.eval.loading import compile_blocks

GRID = TokenGrid(3, 4, 7)  # each device gets one and a half frames


def refusal(run: Callable[[], Any]) -> str:
    try:
        run()
    except InputError as error:
        return str(error)
    return ""


def ulysses(model: Any, **options: Any) -> None:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, **options))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def command(*arguments: str | Path) -> int:
    sys.argv = ["draftattn", *map(str, arguments)]
    try:
        command_line()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def videos(folder: Path) -> dict[str, int]:
    """Three prompts for two processes."""
    common = ["--model", folder / "model", "--prompt-file", folder / "prompts.txt", "--height", "32", "--width", "48"]
    common += ["--frames", "5", "--steps", "1", "--guidance", "1"]
    return {
        "generate": command("generate", *common, "--output", folder / "videos" / "video.mp4"),
        "compare": command("compare", *common, "--sparsity", "0.5,0.9", "--warmup", "0", "--output", folder / "study"),
    }


def spread_over_two(order: str, **settings: Any) -> dict[str, float]:
    """The same forward on one device and on two."""
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs(GRID, batch=2)
    dense = tiny.run(model, inputs)
    with enable(model, tiny.config(**settings)):
        alone = tiny.run(model, inputs)
    if order == "enabled last":
        ulysses(model)
    enable(model, tiny.config(**settings))
    if order == "enabled first":
        ulysses(model)
    together = tiny.run(model, inputs)
    return {"to one device": difference(together, alone), "to dense": difference(together, dense)}


def timestep_per_token() -> dict[str, float]:
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs(GRID, per_token_timesteps=True)
    enable(model, tiny.config())
    alone = tiny.run(model, inputs)
    ulysses(model)
    return {"to one device": difference(tiny.run(model, inputs), alone)}


def compiled() -> dict[str, float]:
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs(GRID)
    enable(model, tiny.config())
    alone = tiny.run(model, inputs)
    ulysses(model)
    counter = CompileCounterWithBackend("eager")
    with patch("torch.compile", functools.partial(torch.compile, backend=counter)):
        compile_blocks(SimpleNamespace(transformer=model))
    return {"to one device": difference(tiny.run(model, inputs), alone), "graphs": counter.frame_count}


def refusals() -> dict[str, str]:
    uneven, heads = tiny.wan_transformer(), tiny.wan_transformer(num_attention_heads=3)
    ulysses(uneven)
    ulysses(heads)
    ring = tiny.wan_transformer()
    ring.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    text = tiny.hunyuan_transformer()
    text._parallel_config = uneven._parallel_config  # diffusers has no plan for it, but a user may bring one
    for model in (uneven, heads, ring, text):
        enable(model, tiny.config())
    gradients = tiny.wan_transformer()
    ulysses(gradients)
    enable(gradients, tiny.config())
    return {
        "tokens": refusal(lambda: tiny.run(uneven, tiny.wan_inputs(TokenGrid(3, 5, 7)))),
        "heads": refusal(lambda: tiny.run(heads, tiny.wan_inputs(GRID))),
        "ring": refusal(lambda: tiny.run(ring, tiny.wan_inputs(GRID))),
        "text": refusal(lambda: tiny.run(text, tiny.hunyuan_inputs(GRID))),
        "gradients": refusal(lambda: gradients(**tiny.wan_inputs(GRID))),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    # diffusers numbers devices by what the accelerator has, and a CPU has none
    torch.accelerator.device_count = lambda: 1
    results: dict[str, Any] = {"commands": videos(folder)}
    results["enabled last"] = spread_over_two("enabled last")
    results["enabled first"] = spread_over_two("enabled first", selection="head")
    results["dense layers"] = spread_over_two("enabled last", dense_layers=(0, 1, 2))
    results["timestep per token"] = timestep_per_token()
    results["compiled"] = compiled()
    results["refusals"] = refusals()
    (folder / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results))
