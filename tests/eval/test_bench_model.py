"""The model benchmark on an architecture small enough for any machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from rich.console import Console
from torch import Tensor

from draftattn import DraftConfig, InputError
from draftattn.cli.model_tables import print_model
from draftattn.eval import architectures, contestants, dense_kernels, model_gate, stages
from draftattn.eval import bench_model as model_bench
from draftattn.eval.architectures import ARCHITECTURES, Architecture, Part, Recipe, TextEncoder
from draftattn.eval.bench_model import BenchSettings, bench_model
from draftattn.eval.random_models import build_transformer, example_inputs, latent_shape, token_grid
from draftattn.eval.scaling import ScalingSettings, bench_scaling
from draftattn.pipelines.video.hunyuan_video import HunyuanVideoAdapter
from draftattn.pipelines.video.hunyuan_video_15 import HunyuanVideo15Adapter
from draftattn.pipelines.video.wan import WanAdapter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = DraftConfig(sparsity=0.75, warmup=0, tile=(1, 4, 4))
SETTINGS = BenchSettings(sparsities=(0.5, 0.75), repeats=1, profile=False)
SIZE = {"height": 128, "width": 192, "num_frames": 9}
T5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
ENCODER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = {**ENCODER, "vocab_size": 300, "num_key_value_heads": 1}
ROTARY = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
QWEN = {**DECODER, "max_window_layers": 1, "rope_parameters": ROTARY}
WAN_VAE = Part("AutoencoderKLWan", {"base_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 1, 1, 1]})
HUNYUAN = {"num_attention_heads": 2, "attention_head_dim": 16, "rope_axes_dim": (4, 6, 6), "num_refiner_layers": 1}


def wan(**changes: Any) -> Part:
    config = {**architectures._WAN, "num_attention_heads": 2, "num_layers": 4, "ffn_dim": 64, "text_dim": 16}
    return Part("WanTransformer3DModel", {**config, **changes})


SMALL = {
    "small-wan": Architecture(
        wan(), WAN_VAE, (TextEncoder("UMT5EncoderModel", T5, config_class="UMT5Config", num_tokens=20),),
        Recipe(128, 192, 9, num_steps=10),
    ),
    "small-wan-timesteps": Architecture(wan(), WAN_VAE, (), Recipe(128, 192, 9), timestep_per_token=True),
    "small-hunyuan": Architecture(
        Part(
            "HunyuanVideoTransformer3DModel",
            {**HUNYUAN, "num_layers": 2, "num_single_layers": 3, "in_channels": 16, "patch_size": 2,
             "text_embed_dim": 16, "pooled_projection_dim": 8},
        ),
        Part(
            "AutoencoderKLHunyuanVideo",
            {"latent_channels": 16, "block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 4},
        ),
        (
            TextEncoder("LlamaModel", DECODER, config_class="LlamaConfig", num_tokens=20, has_negative=False),
            TextEncoder("CLIPTextModel", ENCODER, config_class="CLIPTextConfig", num_tokens=77, has_negative=False),
        ),
        Recipe(128, 192, 9, guidance_passes=1, tiled_decode=True),
    ),
    "small-hunyuan-1.5": Architecture(
        Part(
            "HunyuanVideo15Transformer3DModel",
            {**HUNYUAN, "num_layers": 3, "in_channels": 9, "out_channels": 4, "patch_size": 1, "text_embed_dim": 16,
             "text_embed_2_dim": 8, "image_embed_dim": 8},
        ),
        Part("AutoencoderKLHunyuanVideo15", {"latent_channels": 4, "block_out_channels": (16, 16, 16, 16, 16)}),
        (
            TextEncoder("Qwen2_5_VLTextModel", QWEN, config_class="Qwen2_5_VLTextConfig", num_tokens=20),
            TextEncoder("T5EncoderModel", T5, config_class="T5Config", num_tokens=20, has_negative=False),
        ),
        Recipe(128, 192, 9),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, architecture in SMALL.items():
        monkeypatch.setitem(ARCHITECTURES, name, architecture)


STAGES = {
    "text": {"seconds": 0.5, "peak_memory_gib": None, "encoders": []},
    "decode": {"seconds": 2.0, "peak_memory_gib": None, "tiled": False, "dtype": "float32"},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages have tests of their own; dense kernels need no exact times."""
    original = dense_kernels.measure_dense
    monkeypatch.setattr(model_bench, "measure_stages", lambda *_, **__: STAGES)
    monkeypatch.setattr(model_bench, "measure_dense", lambda *shape, **_: original(*shape, seconds=1e-6))


def bench(model: str = "small-wan", dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    settings = replace(SETTINGS, **changes)
    return bench_model(model, **SIZE, config=CONFIG, settings=settings, dtype=dtype, device=DEVICE)


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["kind"] if row["kind"] != "draft" else str(row["sparsity"]): row for row in result["runs"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_figures_name_what_was_measured(dtype: torch.dtype) -> None:
    result = bench(dtype=dtype)
    found = rows(result)
    assert list(found) == ["stock", "dense", "0.5", "0.75"]
    assert result["tokens"] == result["sequence"] == 3 * 8 * 12
    assert 0.2 < found["0.75"]["density"] < 0.3 < found["0.5"]["density"] < 0.6
    assert result["gate"]["relative_error"] <= result["gate"]["allowed"]
    assert result["gate"]["dense_relative_error"] <= result["gate"]["allowed"]
    assert found["dense"]["relative_error_to_stock"] <= result["gate"]["allowed"]
    for row in found.values():
        assert row["step_seconds"] == 2 * row["seconds"]
        assert row["speedup_over_stock"] == pytest.approx(found["stock"]["seconds"] / row["seconds"])
        assert row["speedup_over_dense"] == pytest.approx(found["dense"]["seconds"] / row["seconds"])


@pytest.mark.parametrize("model", [name for name in SMALL if name != "small-wan"])
def test_every_family_is_measured(model: str) -> None:
    result = bench(model, sparsities=(0.75,))
    found = rows(result)
    assert found["stock"]["seconds"] > 0
    assert found["dense"]["relative_error_to_stock"] <= result["gate"]["allowed"]
    assert 0.2 < found["0.75"]["density"] < 0.6
    text = 0 if "wan" in model else 64
    assert result["sequence"] == result["tokens"] + text
    assert result["passes_per_step"] == SMALL[model].recipe.guidance_passes
    assert result["whole_runs"][0]["warmup_steps"] == 13


def test_profiles_sum_to_the_pass_they_split() -> None:
    found = rows(bench(profile=True))
    assert found["stock"]["profile"] is None
    for name in ("dense", "0.5", "0.75"):
        profile = found[name]["profile"]
        parts = profile["parts"]
        assert sum(parts.values()) == pytest.approx(profile["seconds"])
        assert all(seconds >= 0 for seconds in parts.values())
        assert parts["attention"] > 0
        assert parts["permutation"] > 0
        assert parts["cross-attention"] > 0
        assert parts["projections"] > 0
        assert parts["other"] > 0
        assert (parts["mask"] > 0) == (name != "dense")


def test_whole_runs_add_up() -> None:
    result = bench(warmups=(0.25, 0.0))
    found, stages_ = rows(result), result["stages"]
    ends = stages_["text"]["seconds"] + stages_["decode"]["seconds"]
    assert len(result["whole_runs"]) == 4
    for run in result["whole_runs"]:
        dense_steps = 3 if run["warmup"] else 0
        passes = 2 * dense_steps, 2 * (10 - dense_steps)
        dense, sparse = found["dense"]["seconds"], found[str(run["sparsity"])]["seconds"]
        assert run["draft_seconds"] == pytest.approx(ends + passes[0] * dense + passes[1] * sparse)
        assert run["stock_seconds"] == pytest.approx(ends + 20 * found["stock"]["seconds"])
        assert run["speedup_over_dense"] == pytest.approx(run["dense_seconds"] / run["draft_seconds"])


@pytest.mark.parametrize(("model", "words"), [("small-hunyuan", "no plan to spread"), ("small-wan", "needs a GPU")])
def test_what_cannot_be_spread_is_refused(model: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_bench, "build_transformer", None)
    settings = replace(SETTINGS, context_parallel=2)
    with pytest.raises(InputError, match=words):
        bench_model(model, **SIZE, config=CONFIG, settings=settings, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("model", ["small-wan", "small-hunyuan"])
def test_a_cache_skips_a_share_of_the_sparse_passes(model: str) -> None:
    result = bench(model, cache_shares=(0.5,), sparsities=(0.75,), warmups=(0.25,))
    without, with_cache = result["whole_runs"]
    assert (without["cache_share"], with_cache["cache_share"]) == (0.0, 0.5)
    skipped = 0.5 * result["passes_per_step"] * (result["num_steps"] - without["warmup_steps"])
    saved = skipped * (rows(result)["0.75"]["seconds"] - result["cached_pass_seconds"])
    assert result["cached_pass_seconds"] > 0
    assert with_cache["draft_seconds"] == pytest.approx(without["draft_seconds"] - saved)


def test_a_cache_that_diffusers_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_bench, "time_contestants", None)
    with pytest.raises(InputError, match="FirstBlockCache cannot run on HunyuanVideo15"):
        bench("small-hunyuan-1.5", cache_shares=(0.5,))


def test_what_is_not_asked_for_is_not_measured() -> None:
    result = bench(stock=False, stages=False, guidance=False, sparsities=(0.75,))
    found = rows(result)
    assert list(found) == ["dense", "0.75"]
    assert found["0.75"]["speedup_over_stock"] is None
    assert found["0.75"]["profile"] is None
    assert (result["stages"], result["whole_runs"], result["passes_per_step"]) == (None, [], 1)


def test_blocks_are_compiled_once_for_every_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    original = WanTransformer3DModel.compile_repeated_blocks

    def compile_repeated_blocks(self: Any, **options: Any) -> None:
        assert options == {"fullgraph": True, "dynamic": False}
        original(self, backend=counter, **options)

    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", compile_repeated_blocks)
    result = bench(compiled=True)
    assert result["compiled"]
    assert rows(result)["dense"]["relative_error_to_stock"] <= result["gate"]["allowed"]
    # stock attention's graph, and one that dense and sparse passes share
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("model", "adapter"),
    [("small-wan", WanAdapter), ("small-hunyuan", HunyuanVideoAdapter), ("small-hunyuan-1.5", HunyuanVideo15Adapter)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_is_timed_where_the_rotary_table_keeps_its_order(
    model: str, adapter: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = tuple(site for site in adapter.token_sites if site.name != "rope")
    monkeypatch.setattr(adapter, "token_sites", sites)
    monkeypatch.setattr(contestants, "timed", None)
    with pytest.raises(RuntimeError, match="sparsity 0 differs from dense"):
        bench(model, dtype, stages=False)


def test_nothing_is_timed_where_the_dense_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    original = model_gate.enable

    def broken(transformer: Any, config: DraftConfig, **options: Any) -> Any:
        # dense layers made sparse stand for a wrong kernel
        wrong = replace(config, dense_layers=(), sparsity=0.75) if config.dense_layers else config
        return original(transformer, wrong, **options)

    monkeypatch.setattr(model_gate, "enable", broken)
    with pytest.raises(RuntimeError, match="dense attention on torch differs"):
        bench(stages=False)


def test_one_that_fails_leaves_the_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    original = contestants.enable

    def fails(transformer: Any, config: DraftConfig) -> Any:
        if config.sparsity == 0.5:
            raise RuntimeError("no graph\nat all")
        return original(transformer, config)

    monkeypatch.setattr(contestants, "enable", fails)
    result = bench(profile=True)
    found = rows(result)
    assert found["0.75"]["seconds"] > 0
    assert found["0.5"] == {"kind": "draft", "seconds": None, "sparsity": 0.5, "error": "RuntimeError: no graph"}
    assert {run["sparsity"] for run in result["whole_runs"]} == {0.75}
    with StringIO() as shown:
        print_model(Console(file=shown, width=160), result)
        assert "RuntimeError: no graph" in shown.getvalue()


def test_dense_layers_of_the_drafts_stay_dense() -> None:
    config = replace(CONFIG, dense_layers=(0, -1))
    result = bench_model("small-wan", **SIZE, config=config, settings=SETTINGS, dtype=torch.float32, device=DEVICE)
    assert rows(result)["0.75"]["seconds"] > 0


class TestOutOfMemory:
    def stock_fails(self, monkeypatch: pytest.MonkeyPatch, when: Callable[[Any, Tensor], bool]) -> None:
        """Stock forwards, which no hook of ours has been put on, run out of memory when told to."""
        original = WanTransformer3DModel.forward

        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._forward_pre_hooks and when(self, hidden_states):
                raise torch.OutOfMemoryError
            return original(self, hidden_states, *args, **kwargs)

        monkeypatch.setattr(WanTransformer3DModel, "forward", forward)

    def test_stock_that_does_not_fit_is_said_and_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stock_fails(monkeypatch, lambda model, _: len(model.blocks) == 4)
        result = bench(sparsities=(0.75,))
        found = rows(result)
        assert found["stock"] == {"kind": "stock", "seconds": None, "error": "out of memory"}
        assert found["0.75"]["speedup_over_stock"] is None
        assert found["0.75"]["speedup_over_dense"] > 0
        assert result["whole_runs"][0]["stock_seconds"] is None
        assert result["whole_runs"][0]["speedup_over_dense"] > 0

    def test_the_gate_shortens_the_video_until_stock_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stock_fails(monkeypatch, lambda _, latents: latents.shape[2] > 1)
        assert bench(stock=False)["gate"]["latent_frames"] == 1

    def test_scaling_says_what_does_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stock_fails(monkeypatch, lambda model, latents: len(model.blocks) == 1 and latents.shape[2] == 3)
        settings = ScalingSettings(tokens=(90, 280), sparsities=(0.75,), curve=(), repeats=1)
        result = bench_scaling("small-wan", config=CONFIG, settings=settings, dtype=torch.float32, device=DEVICE)
        errors = [(row["kind"], row["tokens"], row["error"]) for row in result["rows"] if row["error"]]
        assert errors == [("stock", 288, "out of memory")]

    def test_without_a_decode_there_are_no_whole_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        failed = {**STAGES, "decode": {"tiled": True, "dtype": "float32", "error": "out of memory"}}
        monkeypatch.setattr(model_bench, "measure_stages", lambda *_, **__: failed)
        assert bench(sparsities=(0.75,))["whole_runs"] == []


class TestStages:
    def measure(self, model: str, channels: int, guidance: bool = True) -> dict[str, Any]:
        latents = (1, channels, 3, 8, 8)
        return stages.measure_stages(model, latents, guidance=guidance, dtype=torch.bfloat16, device=DEVICE)

    @pytest.mark.parametrize(
        ("model", "channels", "dtype"),
        [("small-wan", 16, "float32"), ("small-hunyuan", 16, "bfloat16"), ("small-hunyuan-1.5", 4, "bfloat16")],
    )
    def test_text_encoders_and_autoencoder_are_run(self, model: str, channels: int, dtype: str) -> None:
        found = self.measure(model, channels)
        assert found["text"]["seconds"] > 0
        assert found["text"]["encoders"][0]["prompts"] == SMALL[model].recipe.guidance_passes
        assert found["decode"]["seconds"] > 0
        assert (found["decode"]["dtype"], found["decode"]["tiled"]) == (dtype, SMALL[model].recipe.tiled_decode)

    def test_without_guidance_one_prompt_is_encoded(self) -> None:
        assert self.measure("small-wan", 16, guidance=False)["text"]["encoders"][0]["prompts"] == 1

    def test_those_of_a_folder_are_loaded(self) -> None:
        found = self.measure("assets/tiny-wan", 16)
        assert found["text"]["seconds"] > 0
        assert found["decode"]["seconds"] > 0

    def test_a_decode_that_does_not_fit_is_made_in_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = AutoencoderKLWan.decode

        def decode(self: Any, z: Any, **options: Any) -> Any:
            if not self.use_tiling:
                raise torch.OutOfMemoryError
            return original(self, z, **options)

        monkeypatch.setattr(AutoencoderKLWan, "decode", decode)
        found = self.measure("small-wan", 16)
        assert found["decode"]["tiled"] is True
        assert found["decode"]["seconds"] > 0

        def never(self: Any, z: Any, **options: Any) -> Any:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(AutoencoderKLWan, "decode", never)
        assert self.measure("small-wan", 16)["decode"]["error"] == "out of memory"


class TestArchitectures:
    @pytest.mark.parametrize("model", [name for name in ARCHITECTURES if not name.startswith("small")])
    def test_full_sizes_have_the_published_number_of_parameters(self, model: str) -> None:
        """On the meta device, so that nothing is allocated."""
        import diffusers
        import transformers

        expected = {
            "wan2.1-1.3b": 1.42, "wan2.1-14b": 14.3, "wan2.2-a14b": 14.3, "wan2.2-ti2v-5b": 5.0,
            "hunyuanvideo": 12.8, "hunyuanvideo-1.5": 8.3,
        }  # fmt: skip
        text = {"UMT5EncoderModel": 5.68, "LlamaModel": 7.5, "CLIPTextModel": 0.123, "Qwen2_5_VLTextModel": 7.07,
                "T5EncoderModel": 0.217}  # fmt: skip
        decoders = {"AutoencoderKLWan": (0.12, 0.71), "AutoencoderKLHunyuanVideo": (0.24,),
                    "AutoencoderKLHunyuanVideo15": (1.2,)}  # fmt: skip
        architecture = ARCHITECTURES[model]

        def billions(build: Any) -> float:
            with torch.device("meta"):
                return sum(parameter.numel() for parameter in build().parameters()) / 1e9

        part = architecture.transformer
        assert billions(lambda: getattr(diffusers, part.class_name)(**part.config)) == pytest.approx(
            expected[model], rel=0.03
        )
        part = architecture.vae
        size = billions(lambda: getattr(diffusers, part.class_name)(**part.config))
        assert any(size == pytest.approx(one, rel=0.08) for one in decoders[part.class_name])
        for encoder in architecture.text_encoders:
            config = getattr(transformers, encoder.config_class)(**encoder.config)
            assert billions(lambda: getattr(transformers, encoder.class_name)(config)) == pytest.approx(  # noqa: B023
                text[encoder.class_name], rel=0.03
            )

    @pytest.mark.parametrize(
        ("model", "tokens"),
        [("wan2.1-1.3b", 32_760), ("wan2.1-14b", 75_600), ("wan2.2-ti2v-5b", 27_280), ("hunyuanvideo", 118_800),
         ("hunyuanvideo-1.5", 49_290)],
    )  # fmt: skip
    def test_recipes_have_the_known_number_of_tokens(self, model: str, tokens: int) -> None:
        recipe = ARCHITECTURES[model].recipe
        latents = latent_shape(model, recipe.height, recipe.width, recipe.num_frames)
        patch = ARCHITECTURES[model].transformer.config["patch_size"]
        space = patch if isinstance(patch, int) else patch[1]
        assert latents[2] * (latents[3] // space) * (latents[4] // space) == tokens

    def test_parts_that_diffusers_loads_in_float32_are_float32(self) -> None:
        transformer = build_transformer("small-wan", torch.bfloat16, torch.device("cpu"))
        kinds = {name: parameter.dtype for name, parameter in transformer.named_parameters()}
        assert kinds["scale_shift_table"] == kinds["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
        assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
        assert not any(parameter.requires_grad for parameter in transformer.parameters())

    def test_a_timestep_for_every_token_where_the_pipeline_passes_one(self) -> None:
        transformer = build_transformer("small-wan", torch.float32, torch.device("cpu"))
        for per_token, ndim in ((True, 2), (False, 1)):
            arguments = example_inputs(
                transformer, (1, 16, 3, 8, 8), torch.float32, torch.device("cpu"), timestep_per_token=per_token
            )
            assert arguments["timestep"].ndim == ndim
        assert token_grid(transformer, arguments).num_tokens == 3 * 4 * 4


class TestDenseKernels:
    SHAPE = dense_kernels.Shape(queries=40, keys=24, heads=2, head_dim=16)

    def test_the_fastest_correct_one_is_named(self) -> None:
        measured = dense_kernels.measure_dense(self.SHAPE, torch.float32, DEVICE, seconds=0.001)
        served = [row["kernel"] for row in measured["rows"] if "seconds" in row]
        assert measured["fastest"] in served
        assert measured["rows"][0]["relative_error"] == 0
        for row in measured["rows"]:
            assert row.get("reasons") or row["seconds"] > 0

    def test_a_wrong_kernel_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = dense_kernels.fastest_dense

        def wrong(*tensors: Any, backend: str) -> Any:
            return original(*tensors, backend="torch") * (1.5 if backend == "cudnn" else 1.0)

        monkeypatch.setattr(dense_kernels, "fastest_dense", wrong)
        monkeypatch.setattr(dense_kernels, "reasons_against_dense", lambda *_: [])
        monkeypatch.setattr(dense_kernels, "CPU_CANDIDATES", ("torch", "cudnn"))
        monkeypatch.setattr(dense_kernels, "CANDIDATES", ("torch", "cudnn"))
        measured = dense_kernels.measure_dense(self.SHAPE, torch.float32, DEVICE, seconds=0.001)
        assert "relative error 5.0e-01" in measured["rows"][1]["reasons"][0]
        assert measured["fastest"] == "torch"


class TestScaling:
    SETTINGS = ScalingSettings(tokens=(90, 280), sparsities=(0.75,), curve=(0.5, 0.9), repeats=1)

    @pytest.mark.parametrize("model", ["small-wan", "small-hunyuan"])
    def test_a_pass_is_scaled_from_its_blocks(self, model: str) -> None:
        result = bench_scaling(model, config=CONFIG, settings=self.SETTINGS, dtype=torch.float32, device=DEVICE)
        full = {"small-wan": {"blocks": 4}, "small-hunyuan": {"transformer_blocks": 2, "single_transformer_blocks": 3}}
        assert result["full_blocks"] == full[model]
        assert [(row["kind"], row["tokens"]) for row in result["rows"]] == [
            (kind, tokens) for tokens in (96, 288) for kind in ("stock", "dense", "draft")
        ]
        for row in (*result["rows"], *result["curve"]):
            blocks = sum(count * row["block_seconds"][name] for name, count in full[model].items())
            assert row["seconds"] == pytest.approx(row["outside"] + blocks)
        assert [row["sparsity"] for row in result["curve"]] == [0.5, 0.9]
        assert {row["tokens"] for row in result["curve"]} == {288}

    def test_only_published_architectures(self) -> None:
        with pytest.raises(InputError, match="scaling builds one of"):
            bench_scaling("assets/tiny-wan", config=CONFIG, settings=self.SETTINGS, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsities": ()}, "sparsity is empty"),
        ({"sparsities": (0.5, 1.0)}, "sparsity holds 1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"num_steps": 0}, "steps is 0"),
        ({"warmups": (0.5, 2.0)}, "warmups holds 2"),
        ({"cache_shares": (-0.5,)}, "cache_shares holds -0.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        BenchSettings(**settings)
