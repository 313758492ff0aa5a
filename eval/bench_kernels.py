"""Times of block-sparse attention kernels against each other and against dense attention, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from draftattn.config import DraftConfig
from draftattn.errors import InputError
from draftattn.eval.environment import device_name, package_versions
from draftattn.eval.kernel_contenders import (
    FLEX_OPTIONS,
    Contender,
    Problem,
    dense_contenders,
    flex_contender,
    sparse_contenders,
)
from draftattn.eval.kernel_gate import Verdict, check, make_problem
from draftattn.eval.kernel_shapes import KernelShape, Rows, computed_pairs, random_mask
from draftattn.eval.kernel_timing import Times, clocks_under_load, time_in_turns
from draftattn.inputs import AttentionInputs
from draftattn.kernels.api import BlockMeans
from draftattn.kernels.pooling import pool_blocks
from draftattn.policies.draft import DraftPolicy
from draftattn.policy import CallContext

SCHEMA = 1
# A backward pass computes five products of the size of the two that the forward pass computes.
BACKWARD_FACTOR = 2.5
Kind = Literal["dense", "sparse", "residual", "dense backward", "backward", "mask"]


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Args:
        densities: shares of the visible block pairs that are computed.
        rows: ``"even"`` or ``"uneven"`` rows of the random masks.
        residual: also measure our kernels with the residual.
        backward: also measure backward passes.
        mask_road: also measure how long a mask takes to make, where the blocks are a video's.
        seconds: how long each kernel is timed at each density.
        kernels: only these contenders and the yardstick; None for all.
    """

    densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    rows: Rows = "even"
    residual: bool = False
    backward: bool = False
    mask_road: bool = True
    seconds: float = 0.3
    kernels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for density in self.densities:
            if not 0 < density <= 1:
                raise InputError(f"density is {density}; it must be above 0 and at most 1")
        if not self.densities:
            raise InputError("densities are empty; give at least one, such as 0.25")
        if self.seconds <= 0:
            raise InputError(f"seconds is {self.seconds}; it must be above 0")


def bench_kernels(
    shapes: Sequence[KernelShape],
    settings: BenchSettings,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Checks every kernel on small problems of each kind, then times those that passed, in turns.

    Effective TFLOP/s are ``4 · D · pairs / time``, where ``pairs`` are the query-key pairs that the mask holds, over
    all heads; with causal attention those that are also visible. A backward pass counts 2.5 times as many.
    ``density`` is the share of the dense call's pairs, as realised. Every kernel gets its view of the mask made before
    the time; the residual's means too.

    Args:
        shapes: attention calls.
        settings: what to measure of each.
        dtype: of the tensors.
        device: where to run.
        on_progress: told what is being done.

    Returns:
        Figures with all that is needed to repeat them; ``red`` names kernels that failed the check.
    """
    unknown = set(settings.kernels or ()) - {x.name for x in [*dense_contenders(device), *sparse_contenders(device)]}
    if unknown:
        known = dict.fromkeys(x.name for x in [*dense_contenders(device), *sparse_contenders(device)])
        raise InputError(f"kernel is {sorted(unknown)[0]!r}; on this device choose from {', '.join(known)}")
    results = []
    flex_options: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for shape in shapes:
            bench = _ShapeBench(shape, settings, dtype, device, on_progress, flex_options)
            results.append(bench.run())
            del bench
            if device.type == "cuda":
                torch.cuda.empty_cache()
    red = sorted({verdict["kernel"] for result in results for verdict in result["gate"] if not verdict["green"]})
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "shapes": results,
        "red": red,
        "device": device_name(device),
        "versions": {**package_versions(), **_versions_of_rivals(device)},
        "notes": {
            "times": "seconds; CUDA events on a GPU, L2 cache not flushed, kernels timed in turns",
            "tflops": "4 * head_dim * pairs / median time; pairs of the mask that are visible, summed over heads; "
            "backward passes count 2.5 times as many",
        },
    }


class _ShapeBench:
    """One shape: its tensors and what has been found so far."""

    def __init__(
        self,
        shape: KernelShape,
        settings: BenchSettings,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[str], None],
        flex_options: dict[str, dict[str, Any]],
    ) -> None:
        self.shape, self.settings, self.dtype, self.device = shape, settings, dtype, device
        self.say = lambda message: on_progress(f"{shape.name}: {message}")
        self.flex_options = flex_options
        self.verdicts: list[Verdict] = []
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        shape, device = self.shape, self.device
        problem = make_problem(shape, None, self.dtype, device)
        self.say("checking dense kernels")
        dense = self._green(dense_contenders(device), dense=True)
        self.say("timing dense kernels")
        pairs = computed_pairs(random_mask(replace(shape, heads=1, kv_heads=1), 1.0, device), shape.heads, shape.causal)
        self._time("dense", dense, problem, 1.0, pairs[1])
        clocks = None
        if self.rows and "seconds" in self.rows[0]:
            call = dense[0].prepare(problem)
            clocks = clocks_under_load(call, self.rows[0]["seconds"]["median"], device)

        self.say("choosing options of FlexAttention")
        sparse = sparse_contenders(device, self._best_flex_options(problem))
        self.say("checking sparse kernels")
        sparse = self._green(sparse)
        with_means = (
            self._green([x for x in sparse if x.ours], with_means=_with_means) if self.settings.residual else []
        )
        for density in self.settings.densities:
            self.say(f"timing at density {density:g}")
            mask = random_mask(shape, density, device, rows=self.settings.rows)
            chosen, total = computed_pairs(mask, shape.heads, shape.causal)
            self._time("sparse", sparse, replace(problem, mask=mask), chosen / total, chosen)
            if with_means and density < 1:
                with_residual = _with_means(replace(problem, mask=mask))
                self._time("residual", with_means, with_residual, chosen / total, chosen)
        if self.settings.mask_road and not shape.causal and (shape.real_blocks or shape.tokens % 128 == 0):
            self.say("timing the making of masks")
            self._time_mask_road(problem)
        if self.settings.backward:
            with torch.enable_grad():
                self._time_backward(dense, sparse)
        return {
            "shape": {**asdict(shape), "dtype": str(self.dtype).removeprefix("torch."), "batch": 1},
            "flex_options": self.flex_options.get(self._flex_key()),
            "clocks": clocks,
            "gate": [verdict.to_json() for verdict in self.verdicts],
            "rows": self._with_ratios(),
        }

    def _wanted(self, contenders: list[Contender]) -> list[Contender]:
        yardstick = dense_contenders(self.device)[0].name
        names = self.settings.kernels
        return [x for x in contenders if names is None or x.name in names or x.name == yardstick]

    def _green(self, contenders: list[Contender], **options: Any) -> list[Contender]:
        """Those that passed the check; those that cannot serve at all are told apart when they would be timed."""
        contenders = self._wanted(contenders)
        verdicts = check(contenders, self.shape, self.dtype, self.device, **options)
        self.verdicts += verdicts
        red = {verdict.kernel for verdict in verdicts if not verdict.green}
        return [x for x in contenders if x.name not in red]

    def _time(
        self,
        kind: Kind,
        contenders: list[Contender],
        problem: Problem,
        density: float,
        pairs: float,
        wrap: Callable[[Callable[[], torch.Tensor]], Callable[[], Any]] = lambda call: call,
    ) -> None:
        """Adds a row for each contender: its times, or why it has none."""
        calls: dict[str, Callable[[], Any]] = {}
        reasons: dict[str, list[str]] = {}
        for contender in contenders:
            if why := contender.reasons_against(problem):
                reasons[contender.name] = why
                continue
            try:
                calls[contender.name] = wrap(contender.prepare(problem))
                calls[contender.name]()
            except Exception as failure:  # any other people's kernel may raise anything
                reasons[contender.name] = [f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"]
                calls.pop(contender.name, None)
        times = time_in_turns(calls, self.settings.seconds, self.device)
        ours = {x.name for x in contenders if x.ours}
        for contender in contenders:
            name = contender.name
            row: dict[str, Any] = {"kernel": name, "kind": kind, "ours": name in ours, "density": round(density, 5)}
            if name in times:
                operations = 4 * self.shape.head_dim * pairs * (BACKWARD_FACTOR if "backward" in kind else 1)
                row["seconds"] = times[name].to_json()
                row["tflops"] = float(f"{operations / times[name].median / 1e12:.4g}")
            else:
                row["reasons"] = reasons[name]
            self.rows.append(row)

    def _flex_key(self) -> str:
        return f"head_dim {self.shape.head_dim}, causal {self.shape.causal}, ragged {self.shape.real_blocks}"

    def _best_flex_options(self, problem: Problem) -> dict[str, Any]:
        """Kernel options under which FlexAttention is fastest at the lowest density, tried once for a kind of shape."""
        key = self._flex_key()
        if key not in self.flex_options:
            contenders = self._wanted([flex_contender()]) if self.device.type == "cuda" else []
            if not contenders or contenders[0].reasons_against(problem):
                return {}
            mask = random_mask(self.shape, min(self.settings.densities), self.device, rows=self.settings.rows)
            calls = {}
            for name, options in FLEX_OPTIONS.items():
                try:
                    call = flex_contender(options).prepare(replace(problem, mask=mask))
                    call()
                except Exception:  # options that this GPU or version of torch does not know
                    continue
                calls[name] = call
            times = time_in_turns(calls, self.settings.seconds / 3, self.device)
            best = min(times, key=lambda name: times[name].median, default="its defaults")
            self.flex_options[key] = FLEX_OPTIONS[best]
        return self.flex_options[key]

    def _time_mask_road(self, problem: Problem) -> None:
        """Pooling, scores, selection and lists, at the lowest density, without and with the residual's means."""
        density = min(self.settings.densities)
        if density == 1:
            return
        layout = self.shape.layout(self.device)
        context = CallContext()

        def inputs() -> AttentionInputs:
            return AttentionInputs(problem.query, problem.key, problem.value, layout)

        mask, with_means = (DraftPolicy(DraftConfig(sparsity=1 - density, residual=x)) for x in (False, True))
        calls: dict[str, Callable[[], Any]] = {
            "mask": lambda: mask(inputs(), context),
            "mask and means": lambda: with_means(inputs(), context),
            "of it pooling": lambda: inputs().pool("query", "key"),
        }
        times = time_in_turns(calls, self.settings.seconds, self.device)
        for name, found in times.items():
            self.rows.append({"kernel": name, "kind": "mask", "ours": True, "density": density, **_seconds(found)})

    def _time_backward(self, dense: list[Contender], sparse: list[Contender]) -> None:
        """Backward passes alone, the forward pass done before."""
        self.say("checking gradients")
        rivals = [x for x in dense if x.name != "fa4"]
        dense = self._green(rivals, dense=True, gradient=True)
        sparse = self._green([x for x in sparse if x.name != "fa4"], gradient=True)
        problem = make_problem(self.shape, None, self.dtype, self.device, gradient=True)
        tensors = (problem.query, problem.key, problem.value)
        upstream = torch.randn_like(problem.query)

        def backward(call: Callable[[], torch.Tensor]) -> Callable[[], Any]:
            # a compiled rival must keep its buffers, for its backward pass is repeated
            with torch._functorch.config.patch(donated_buffer=False):
                output = call()
            return lambda: torch.autograd.grad(output, tensors, upstream, retain_graph=True)

        self.say("timing dense backward passes")
        pairs = computed_pairs(
            random_mask(replace(self.shape, heads=1, kv_heads=1), 1.0, self.device), self.shape.heads, self.shape.causal
        )
        self._time("dense backward", dense, problem, 1.0, pairs[1], backward)
        for density in self.settings.densities:
            self.say(f"timing backward passes at density {density:g}")
            mask = random_mask(self.shape, density, self.device, rows=self.settings.rows)
            chosen, total = computed_pairs(mask, self.shape.heads, self.shape.causal)
            self._time("backward", sparse, replace(problem, mask=mask), chosen / total, chosen, backward)

    def _with_ratios(self) -> list[dict[str, Any]]:
        """The rows with how many times as fast each is as the yardstick, and as FA4 at the same density."""

        def median(kind: str, kernel: str | None = None, density: float | None = None) -> float | None:
            for row in self.rows:
                same = row["kind"] == kind and "seconds" in row and kernel in (None, row["kernel"])
                if same and density in (None, row["density"]):
                    return float(row["seconds"]["median"])
            return None

        yardstick = dense_contenders(self.device)[0].name
        for row in self.rows:
            if "seconds" not in row:
                continue
            seconds, kind, density = row["seconds"]["median"], row["kind"], row["density"]
            if kind == "mask":
                sparse = [x for x in self.rows if x["kind"] == "sparse" and x["ours"] and "seconds" in x]
                least = min((x["density"] for x in sparse), default=None)
                own = [x["seconds"]["median"] for x in sparse if x["density"] == least]
                row["share_of_kernel"] = round(seconds / min(own), 4) if own else None
                continue
            dense = median("dense backward" if "backward" in kind else "dense", yardstick)
            row["speedup_over_dense"] = round(dense / seconds, 3) if dense else None
            if kind == "residual":
                plain = median("sparse", row["kernel"], density)
                row["time_over_plain"] = round(seconds / plain, 4) if plain else None
            if kind in ("sparse", "residual"):
                fa4 = median("sparse", "fa4", density)
                row["speedup_over_fa4"] = round(fa4 / seconds, 3) if fa4 else None
        return self.rows


def _seconds(times: Times) -> dict[str, Any]:
    return {"seconds": times.to_json()}


def _with_means(problem: Problem) -> Problem:
    assert problem.mask is not None
    offsets = problem.mask.key_offsets
    means = BlockMeans(*(pool_blocks(x, offsets).to(x.dtype) for x in (problem.key, problem.value)))
    return replace(problem, residual=means)


def _versions_of_rivals(device: torch.device) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in ("flash-attn-4", "nvidia-cutlass-dsl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found
