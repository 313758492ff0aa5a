"""Time of one denoising step, and of a whole run: stock dense, best dense, and draft attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.eval.architectures import ARCHITECTURES, read_architecture, recipe_of
from draftattn.eval.contestants import Contestant, profile_contestants, time_cached_pass, time_contestants
from draftattn.eval.dense_kernels import Shape, measure_dense, relative_error
from draftattn.eval.environment import device_name, package_versions
from draftattn.eval.model_gate import attention_shape, check_gate, stock_reference
from draftattn.eval.random_models import build_transformer, example_inputs, latent_shape, token_grid
from draftattn.eval.settings import config_to_json
from draftattn.eval.stages import free, measure_stages
from draftattn.eval.whole_run import WARMUPS, whole_runs
from draftattn.kernels.backends import choose_backend
from draftattn.kernels.dense import DenseBackend
from draftattn.pipelines.video.adapter import adapter_for, resolve_layers
from draftattn.pipelines.video.checks import check_backend
from draftattn.pipelines.video.parallel import check_spread, ulysses

SCHEMA = 2


@dataclass(frozen=True)
class BenchSettings:
    """What to measure, beyond the video and the config.

    Args:
        sparsities: shares of blocks dropped, each timed.
        repeats: timed passes of each kind.
        num_steps: denoising steps of a whole run; None for the model's recipe.
        guidance: whether a step takes the forward passes that guidance asks for.
        warmups: shares of dense steps of the whole runs.
        cache_shares: shares of the sparse passes that a step cache skips, for further whole runs.
        stock: time stock diffusers too.
        stages: measure text encoding and decoding too; without them there are no whole runs.
        profile: split the passes by what their time goes to.
        compiled: compile the repeated blocks, of stock diffusers too.
        context_parallel: processes that share the transformer, by Ulysses; their group must exist.

    Raises:
        InputError: if a value is out of range.
    """

    sparsities: tuple[float, ...] = (0.75, 0.9)
    repeats: int = 3
    num_steps: int | None = None
    guidance: bool = True
    warmups: tuple[float, ...] = WARMUPS
    cache_shares: tuple[float, ...] = ()
    stock: bool = True
    stages: bool = True
    profile: bool = True
    compiled: bool = False
    context_parallel: int = 1

    def __post_init__(self) -> None:
        check_sparsities(self.sparsities)
        if self.repeats < 1:
            raise InputError(f"repeats is {self.repeats}; it must be at least 1")
        if self.num_steps is not None and self.num_steps < 1:
            raise InputError(f"steps is {self.num_steps}; it must be at least 1")
        for name in ("warmups", "cache_shares"):
            for share in getattr(self, name):
                if not 0 <= share <= 1:
                    raise InputError(f"{name} holds {share:g}; each must be a share of the steps in [0, 1]")


def check_sparsities(sparsities: Sequence[float]) -> None:
    """Checks the shares of blocks to drop.

    Raises:
        InputError: if there are none, or one is out of range.
    """
    if not sparsities:
        raise InputError("sparsity is empty; give shares of blocks to drop such as 0.75,0.9")
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise InputError(f"sparsity holds {sparsity:g}; each must be in [0, 1): the share of blocks dropped")


@torch.inference_mode()
def bench_model(
    model: str,
    *,
    height: int,
    width: int,
    num_frames: int,
    config: DraftConfig,
    settings: BenchSettings,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Forward passes of one transformer, taken alternately, and what they make of a whole run.

    A correctness gate comes first: on the first blocks, at the full size, draft attention with sparsity 0 and dense
    attention on the best kernel must equal stock diffusers.

    Args:
        model: an architecture, folder or repository; see ``read_architecture``.
        height: pixels.
        width: pixels.
        num_frames: frames.
        config: settings of draft attention; the warm-up must be 0, and the sparsity is that of ``settings``. Where
            ``dense_backend`` names a kernel, dense attention is timed on it in place of the fastest.
        settings: what to measure.
        dtype: precision.
        device: where to run.
        on_progress: told what is being done.

    Returns:
        Figures with all that is needed to repeat them; see ``eval/results/README.md``.

    Raises:
        RuntimeError: if the gate is red.
    """
    class_name, transformer_config, _ = read_architecture(model)
    recipe = recipe_of(model)
    latents = latent_shape(model, height, width, num_frames)
    check_backend(config, transformer_config, dtype, device)
    adapter = adapter_for(class_name)
    resolve_layers(config.dense_layers, adapter.num_layers(transformer_config))
    degree = settings.context_parallel
    if degree > 1:
        check_spread(adapter, degree, device)
    passes = recipe.guidance_passes if settings.guidance else 1
    num_steps = recipe.num_steps if settings.num_steps is None else settings.num_steps

    stages = None
    if settings.stages:
        stages = measure_stages(
            model, latents, guidance=passes > 1, dtype=dtype, device=device, on_progress=on_progress
        )
    on_progress("building the transformer")
    transformer: Any = build_transformer(model, dtype, device)
    per_token = model in ARCHITECTURES and ARCHITECTURES[model].timestep_per_token
    arguments = example_inputs(transformer, latents, dtype, device, timestep_per_token=per_token)
    grid = token_grid(transformer, arguments)
    weights = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else None

    on_progress("measuring dense kernels")
    shape = attention_shape(transformer, arguments, config)
    whole_heads = shape.heads
    shape = shape._replace(heads=-(-whole_heads // degree))
    dense_kernels = {"self": measure_dense(shape, dtype, device)}
    if class_name == "WanTransformer3DModel":
        text = arguments["encoder_hidden_states"].shape[1]
        dense_kernels["cross"] = measure_dense(shape._replace(keys=text), dtype, device, seconds=0.05)
    free(device)
    kernel: DenseBackend = config.dense_backend
    if kernel == "auto":
        kernel = _agree(dense_kernels["self"]["fastest"]) if degree > 1 else dense_kernels["self"]["fastest"]

    layers = tuple(range(len(adapter.attention_layers(transformer))))
    dense_config = replace(config, dense_layers=layers, dense_backend=kernel)
    on_progress("checking that sparsity 0 and the best dense kernel equal stock attention")
    reference = stock_reference(transformer, arguments)
    if degree > 1:
        transformer.enable_parallelism(config=ulysses(whole_heads, grid.num_tokens, degree))
    nothing_dropped = replace(config, sparsity=0.0, dense_layers=())
    gate = check_gate(transformer, reference, dense_config, nothing_dropped, dtype)

    contestants = [
        *([Contestant("stock", None)] if settings.stock else []),
        Contestant("dense", dense_config),
        *(Contestant("draft", replace(config, sparsity=sparsity)) for sparsity in settings.sparsities),
    ]
    if settings.compiled:
        # the hooks by which diffusers shares tokens out to devices break the graph of the block that has them
        transformer.compile_repeated_blocks(fullgraph=degree == 1, dynamic=False)
    cached = None
    if settings.cache_shares:
        on_progress("timing a pass that FirstBlockCache skips")
        sparsest = max(settings.sparsities)
        cached = time_cached_pass(transformer, arguments, replace(config, sparsity=sparsest), settings.repeats, device)
    # blocks are compiled by their class, and once more where a later one differs from the first
    warm_blocks = 2 if settings.compiled else 1
    time_contestants(transformer, arguments, contestants, settings.repeats, device, on_progress, warm_blocks)
    if settings.profile:
        profile_contestants(transformer, arguments, contestants, device, on_progress)

    name = str(dtype).removeprefix("torch.")
    devices = f"{degree} × " * (degree > 1) + device_name(device)
    result = {
        "schema": SCHEMA,
        "title": f"{model}, {height}×{width}×{num_frames}, {grid.num_tokens} tokens, {name}, {devices}",
        "model": model,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "grid": list(grid),
        "tokens": grid.num_tokens,
        "sequence": shape.queries,
        "dtype": name,
        "repeats": settings.repeats,
        "compiled": settings.compiled,
        "passes_per_step": passes,
        "num_transformers": ARCHITECTURES[model].num_transformers if model in ARCHITECTURES else 1,
        "settings": config_to_json(config),
        "kernel": kernel_name(config, shape, dtype, device),
        "gate": gate,
        "dense_kernels": dense_kernels,
        "weights_gib": weights,
        "runs": describe(contestants, passes),
        "stages": stages,
        "num_steps": num_steps,
        "cached_pass_seconds": cached,
        "whole_runs": describe_whole_runs(contestants, stages, num_steps, passes, settings, cached),
        "context_parallel": {"ulysses_degree": degree} if degree > 1 else None,
        "device": devices,
        "versions": package_versions(),
    }
    del transformer
    free(device)
    return result


def describe(contestants: Sequence[Contestant], passes: int) -> list[dict[str, Any]]:
    """A row for each contestant."""
    seconds = {contestant.kind: contestant.seconds for contestant in contestants if contestant.kind != "draft"}
    stock_output = next((contestant.output for contestant in contestants if contestant.kind == "stock"), None)
    rows = []
    for contestant in contestants:
        own = contestant.seconds
        row: dict[str, Any] = {"kind": contestant.kind, "seconds": own}
        if contestant.config is not None and contestant.kind == "draft":
            row["sparsity"] = contestant.config.sparsity
        if contestant.error is not None:
            rows.append({**row, "error": contestant.error})
            continue
        assert own is not None
        row |= {
            "step_seconds": passes * own,
            "all_seconds": contestant.times,
            "peak_memory_gib": contestant.peak_memory_gib,
            "profile": contestant.profile,
        }
        for against in ("stock", "dense"):
            other = seconds.get(against)
            row[f"speedup_over_{against}"] = None if other is None else other / own
        if contestant.config is not None and contestant.kind == "dense":
            row["kernel"] = contestant.config.dense_backend
            if stock_output is not None and contestant.output is not None:
                row["relative_error_to_stock"] = relative_error(contestant.output, stock_output)
        if contestant.kind == "draft":
            row |= {"density": contestant.density, "mask_seconds": median(contestant.mask_times)}
        rows.append(row)
    return rows


def describe_whole_runs(
    contestants: Sequence[Contestant],
    stages: dict[str, Any] | None,
    num_steps: int,
    passes: int,
    settings: BenchSettings,
    cached_pass: float | None,
) -> list[dict[str, Any]]:
    """Whole runs; none where text encoding or decoding was not measured or did not fit into memory."""
    if stages is None or "error" in stages["decode"]:
        return []
    by_kind = {contestant.kind: contestant.seconds for contestant in contestants}
    dense = by_kind["dense"]
    sparse = {
        contestant.config.sparsity: contestant.seconds
        for contestant in contestants
        if contestant.kind == "draft" and contestant.config is not None and contestant.seconds is not None
    }
    if dense is None:
        return []
    return whole_runs(
        num_steps=num_steps,
        passes=passes,
        stock_pass=by_kind.get("stock"),
        dense_pass=dense,
        sparse_passes=sparse,
        text=stages["text"]["seconds"],
        decode=stages["decode"]["seconds"],
        warmups=settings.warmups,
        cached_pass=cached_pass or 0.0,
        cache_shares=settings.cache_shares,
    )


def kernel_name(config: DraftConfig, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that serves sparse attention of this shape."""
    example = torch.empty(1, 128, 1, shape.head_dim, dtype=dtype, device=device)
    return choose_backend(config.backend, example, example, example)


def _agree(backend: DenseBackend) -> DenseBackend:
    """What the first process found to be the fastest, in all of them."""
    found: list[Any] = [backend]
    torch.distributed.broadcast_object_list(found, src=0)
    agreed: DenseBackend = found[0]
    return agreed
