"""Times of sparse attention systems against dense attention: one layer's prefill, and whole models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from draftattn.errors import InputError
from draftattn.eval.dense_yardstick import dense_yardstick, yardstick_name
from draftattn.eval.environment import device_name, package_versions
from draftattn.eval.kernel_timing import clocks_under_load, time_in_turns
from draftattn.eval.llm_gate import check_system, small_call
from draftattn.eval.llm_specs import DENSE, SystemSpec
from draftattn.eval.perplexity import applied
from draftattn.pipelines.llm.apply import make_system
from draftattn.pipelines.llm.dense import without_cudnn
from draftattn.pipelines.llm.density import DensityRecorder
from draftattn.pipelines.llm.system import AttentionCall, AttentionSystem

SCHEMA = 1
GATE_TOKENS = {"cuda": 8192}  # by device; so many that a system leaves something out
FEWER_GATE_TOKENS = 2048
DEFAULT_SYSTEMS = (
    "draft:density=0.1",
    "moba:chunk_size=4096,top_k=12",
    "moba:chunk_size=1024,top_k=12",
    "infllm:query_block=32",
    "minference",
    "xattention",
    "flexprefill",
)
# one line each: heads, key heads, head_dim, channels, of the feed-forward, layers, vocabulary
ARCHITECTURES = {
    "llama-1b": (32, 8, 64, 2048, 8192, 16, 128_256),
    "llama-8b": (32, 8, 128, 4096, 14336, 32, 128_256),
    "tiny": (4, 2, 16, 64, 96, 2, 64),
}


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one layer's attention.

    Args:
        heads: query heads.
        kv_heads: key heads.
        head_dim: channels of a head.
        batch: sequences.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise InputError(f"heads is {self.heads}; kv_heads {self.kv_heads} must divide it")


@torch.no_grad()
def bench_attention(
    shape: AttentionShape,
    lengths: Sequence[int],
    systems: Sequence[SystemSpec],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = 0.3,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Times causal prefill attention of one layer by systems and by dense attention, in turns, selection included.

    Queries, keys and values are random and smooth along the sequence. Rules with a mass threshold keep more of such
    data than of a model's, so a row says the density it realised. Each system is first checked against float64 on the
    first tokens of one key head; one that fails is not timed. ``dense_len`` is not applied.

    Returns:
        Rows of ``length`` and ``system`` with times in seconds, ``speedup`` over dense (see
        `draftattn.eval.dense_yardstick`), ``density`` and ``selection_seconds``; ``red`` names systems that failed the
        check.
    """
    rows, gates = [], []
    for length in lengths:
        call = random_call(shape, length, dtype, device)
        made = {spec.text: _system(spec) for spec in systems if spec.name != DENSE}
        calls: dict[str, Callable[[], Any]] = {DENSE: dense_yardstick(call.query, call.key, call.value, call.scale)}
        for name, system in made.items():
            on_progress(f"checking {name}, {length} tokens")
            verdict = check_system(system, small_call(system, call, GATE_TOKENS.get(device.type, FEWER_GATE_TOKENS)))
            gates.append({"system": name, "length": length, **(verdict or {"green": None})})
            if verdict is None or verdict["green"]:
                calls[name] = lambda system=system, call=call: system.attend(call)  # type: ignore[misc]
                if system.mask_of(call) is not None:
                    calls[f"{name} selection"] = lambda system=system, call=call: system.mask_of(call)  # type: ignore[misc]
        on_progress(f"timing {length} tokens")
        times = time_in_turns(calls, seconds, device)
        dense = times[DENSE].median
        on_progress(f"clocks, {length} tokens")
        rows.append(
            {
                "length": length,
                "system": DENSE,
                "options": {},
                "seconds": times[DENSE].to_json(),
                "speedup": 1.0,
                "density": 1.0,
                "selection_seconds": None,
                "clocks": clocks_under_load(calls[DENSE], dense, device),
            }
        )
        for spec in systems:
            if spec.text not in times:
                continue
            selection = times.get(f"{spec.text} selection")
            rows.append(
                {
                    "length": length,
                    **spec.to_json(),
                    "seconds": times[spec.text].to_json(),
                    "speedup": dense / times[spec.text].median,
                    "density": _density(made[spec.text], call),
                    "selection_seconds": None if selection is None else selection.median,
                    "clocks": None,
                }
            )
        del call, calls
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        **_report("attention", dtype, device),
        "shape": asdict(shape),
        "baseline": yardstick_name(dtype, device),
        "gate": gates,
        "red": sorted({gate["system"] for gate in gates if gate["green"] is False}),
        "rows": rows,
    }


@dataclass
class _Times:
    """Of one system at one length, seconds."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)
    density: float | None = None


@torch.no_grad()
def bench_generation(
    model: Any,
    name: str,
    lengths: Sequence[int],
    systems: Sequence[SystemSpec],
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Times prefill and decoding of a whole model, dense and with systems, on random tokens.

    Decoding is a loop of forward passes of one token with the cache, without sampling, that waits for every token as
    `generate` does. Systems take turns; medians over ``repeats`` prefills and over all their tokens. Dense decoding is
    torch's attention without cuDNN's kernels, see `draftattn.pipelines.llm.dense.without_cudnn`. What the stock model
    takes, with the kernels that torch chooses, is said apart, over ``new_tokens`` tokens: a text that is generated has
    a number of keys that no step before had, and so have these.

    Returns:
        Rows of ``length`` and ``system`` with ``prefill_seconds``, ``decode_seconds`` per token, their speed-ups over
        dense, and the ``density`` of the prefill; in dense rows on a GPU also ``stock_decode_seconds``.
    """
    device = model.device
    specs = [SystemSpec(DENSE), *(spec for spec in systems if spec.name != DENSE)]
    rows: list[dict[str, Any]] = []
    for length in lengths:
        tokens = torch.randint(0, model.config.vocab_size, (1, length), device=device)
        found = [_Times() for _ in specs]
        for turn in range(repeats + 1):
            # in turns: a machine's host has slow and fast minutes
            for spec, times in zip(specs, found, strict=True):
                on_progress(f"{spec.text}, {length} tokens")
                with applied(model, spec) as recorder:
                    if recorder is not None:
                        recorder.enabled = turn == 0
                    seconds, step = _prefill(model, tokens, device)
                    if turn == 0:
                        times.density = 1.0 if recorder is None else recorder.density()
                    with without_cudnn() if spec.name == DENSE else nullcontext():
                        step, each = _decode(model, step, new_tokens if turn else 1, device)
                    if turn:  # the first compiles
                        times.prefill.append(seconds)
                        times.decode += each
                    if turn == 1 and spec.name == DENSE and device.type == "cuda":
                        # as many keys as nothing had before, of which cuDNN keeps no plan yet
                        times.stock = _decode(model, step, new_tokens, device)[1]
                    del step  # its cache: the next system's takes as much
        dense, *_ = found
        for spec, times in zip(specs, found, strict=True):
            prefill, decode = median(times.prefill), median(times.decode)
            stock = {"stock_decode_seconds": median(times.stock)} if times.stock else {}
            rows.append(
                {
                    "length": length,
                    **spec.to_json(),
                    "prefill_seconds": prefill,
                    "decode_seconds": decode,
                    **stock,
                    "density": times.density,
                    "prefill_speedup": median(dense.prefill) / prefill,
                    "decode_speedup": median(dense.decode) / decode,
                }
            )
    report = _report("generation", model.dtype, device)
    report["notes"]["decode_seconds"] = (
        "dense: torch's attention without cuDNN's kernels; stock_decode_seconds: with those that torch chooses, at "
        "numbers of keys that are new"
    )
    return {**report, "model": name, "new_tokens": new_tokens, "rows": rows}


def random_model(name: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama with random weights in the sizes of a known model; fewer layers on request.

    Raises:
        InputError: if the name is unknown, or it has fewer layers.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"architecture is {name!r}; choose from {', '.join(ARCHITECTURES)}")
    heads, kv_heads, head_dim, hidden, inner, depth, vocabulary = ARCHITECTURES[name]
    if layers is not None and not 1 <= layers <= depth:
        raise InputError(f"layers is {layers}; {name} has {depth}, allowed is 1 to {depth}")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=depth if layers is None else layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2**20,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def random_call(shape: AttentionShape, length: int, dtype: torch.dtype, device: torch.device) -> AttentionCall:
    """Random tensors, seeded, that drift along the sequence, so that neighbours resemble each other."""
    generator = torch.Generator(device=device).manual_seed(length)

    def drifting(heads: int) -> Tensor:
        size = shape.batch, length, heads, shape.head_dim
        x = torch.randn(size, generator=generator, device=device, dtype=dtype)
        marks = torch.randn(
            shape.batch, -(-length // 64), heads, shape.head_dim, generator=generator, device=device, dtype=dtype
        )
        return x.add_(marks.repeat_interleave(64, dim=1)[:, :length])

    query, key, value = (drifting(heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    return AttentionCall(query, key, value, shape.head_dim**-0.5, 0, nn.Identity())


def _system(spec: SystemSpec) -> AttentionSystem:
    system = make_system(spec.name, **dict(spec.options))
    kind = type(system)
    # what tells its blocks from a call alone needs no model, though inside one it may keep something beside the cache
    needs_hooks = kind.attach is not AttentionSystem.attach and kind.mask_of is AttentionSystem.mask_of
    if kind.forward is not AttentionSystem.forward or needs_hooks:
        raise InputError(f"{spec.name} works inside a model only; time it with --model")
    return system


def _density(system: AttentionSystem, call: AttentionCall) -> float | None:
    recorder = DensityRecorder()
    system.attend(replace(call, recorder=recorder))
    return recorder.density()


def _prefill(model: Any, tokens: Tensor, device: torch.device) -> tuple[float, Any]:
    """Seconds, and the model's output with its cache."""
    start = _now(device)
    step = model(tokens, use_cache=True, logits_to_keep=1)
    return _now(device) - start, step


def _decode(model: Any, step: Any, new_tokens: int, device: torch.device) -> tuple[Any, list[float]]:
    """The model's output after more tokens, and the seconds of each."""
    times = [_now(device)]
    for _ in range(new_tokens):
        token = step.logits[:, -1:].argmax(-1)
        step = model(token, past_key_values=step.past_key_values, use_cache=True)
        times.append(_now(device))
    return step, [end - start for start, end in pairwise(times)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _report(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "versions": package_versions(),
        "notes": {
            "times": "seconds, choice of blocks included; attention: CUDA events on a GPU, systems timed in turns",
            "density": "share of the causal pairs of a query and a key that was computed; nsa sums three branches",
        },
    }
