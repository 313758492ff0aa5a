"""HunyuanVideo-1.5: padding, absent glyphs and the absent image are dropped, and nobody notices."""

from __future__ import annotations

from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._dynamo.testing
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
)
from torch import Tensor

from draftattn import TokenGrid, disable, enable
from draftattn.pipelines.video.adapter import adapter_for
from draftattn.pipelines.video.hunyuan_video_15 import HunyuanVideo15Adapter

GRID = TokenGrid(3, 5, 7)
VIDEO = GRID.num_tokens
LAYERS = 3
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}
CONDITIONS: dict[str, dict[str, Any]] = {
    "text": {"lengths": (5,)},
    "text padded on the left": {"lengths": (5,), "padding_side": "left"},
    "full text and glyphs": {"lengths": (12,), "glyphs": (6,)},
    "image": {"lengths": (5,), "has_image": True},
    "image and glyphs": {"lengths": (5,), "glyphs": (2,), "has_image": True},
    "batch": {"lengths": (5, 11), "glyphs": (3, 0)},
    "batch, left": {"lengths": (5, 11), "glyphs": (0, 6), "padding_side": "left"},
    "batch with images": {"lengths": (12, 1), "glyphs": (0, 4), "has_image": True},
}


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("grid", [GRID, TokenGrid(2, 4, 8), TokenGrid(1, 1, 1)], ids=lambda g: "x".join(map(str, g)))
@pytest.mark.parametrize("layers", ["sparse", "dense", "mixed"])
def test_sparsity_zero_and_dense_layers_equal_the_model(
    tiny: ModuleType, name: str, grid: TokenGrid, layers: str
) -> None:
    model, inputs = tiny.hunyuan_15_transformer(), tiny.hunyuan_15_inputs(grid, **CONDITIONS[name])
    expected = tiny.run(model, inputs)
    dense_layers = {"sparse": (), "dense": range(LAYERS), "mixed": (1,)}[layers]
    enable(model, tiny.config(sparsity=0, dense_layers=tuple(dense_layers)))
    torch.testing.assert_close(tiny.run(model, inputs), expected, **ROUNDING)


@pytest.mark.parametrize("tile", [(3, 2, 2), (1, 4, 4)], ids=str)
@pytest.mark.parametrize("settings", [{"residual": False}, {"selection": "head"}], ids=str)
def test_any_tile_and_selection_equals_dense(tiny: ModuleType, tile: tuple[int, int, int], settings: dict) -> None:
    model, inputs = tiny.hunyuan_15_transformer(), tiny.hunyuan_15_inputs(GRID, (5, 9), (2, 0))
    expected = tiny.run(model, inputs)
    enable(model, tiny.config(sparsity=0, tile=tile, **settings))
    torch.testing.assert_close(tiny.run(model, inputs), expected, **ROUNDING)


def test_dropping_blocks_changes_the_output_and_disabling_restores_it(tiny: ModuleType) -> None:
    model, inputs = tiny.hunyuan_15_transformer(), tiny.hunyuan_15_inputs(GRID)
    before, expected = tiny.footprint(model), tiny.run(model, inputs)
    enable(model, tiny.config(sparsity=0.6))
    draft = tiny.run(model, inputs)
    assert draft.isfinite().all()
    assert (draft - expected).abs().max() > 1e-3
    assert (draft - expected).norm() < expected.norm()
    disable(model)
    assert tiny.footprint(model) == before
    assert torch.equal(tiny.run(model, inputs), expected)


@pytest.mark.parametrize("site", ["rope", "x_embedder"])
def test_leaving_out_a_site_would_be_caught(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    sites = tuple(found for found in HunyuanVideo15Adapter.token_sites if found.name != site)
    assert len(sites) == 2
    monkeypatch.setattr(HunyuanVideo15Adapter, "token_sites", sites)
    model, inputs = tiny.hunyuan_15_transformer(), tiny.hunyuan_15_inputs(GRID)
    expected = tiny.run(model, inputs)
    enable(model, tiny.config(sparsity=0))
    assert (tiny.run(model, inputs) - expected).abs().max() > 1e-3


class TestMask:
    @pytest.mark.parametrize("dense_layers", [(), tuple(range(LAYERS))], ids=["sparse", "dense"])
    def test_no_mask_of_tokens_by_tokens_takes_memory(self, tiny: ModuleType, dense_layers: tuple[int, ...]) -> None:
        """Every repeated tensor of a forward is noted: the stock processor repeats the mask for every query."""
        model, inputs = tiny.hunyuan_15_transformer(), tiny.hunyuan_15_inputs(GRID, (5, 9))
        devices: list[tuple[int, str]] = []
        original = Tensor.repeat

        def spy(self: Tensor, *sizes: int) -> Tensor:
            repeated = original(self, *sizes)
            devices.append((repeated.numel(), repeated.device.type))
            return repeated

        with patch.object(Tensor, "repeat", spy):
            tiny.run(model, inputs)
            large = 2 * (VIDEO + 25) ** 2
            assert [device for size, device in devices if size == large] == [inputs["timestep"].device.type] * LAYERS
            devices.clear()
            enable(model, tiny.config(dense_layers=dense_layers))
            tiny.run(model, inputs)
        assert [device for size, device in devices if size > VIDEO**2] == ["meta"] * LAYERS

    @pytest.mark.parametrize("name", CONDITIONS)
    def test_dense_layers_see_valid_tokens_alone(self, tiny: ModuleType, name: str) -> None:
        condition = CONDITIONS[name]
        valid = [
            text + glyphs + 7 * condition.get("has_image", False)
            for text, glyphs in zip(
                condition["lengths"], condition.get("glyphs", (0,) * len(condition["lengths"])), strict=True
            )
        ]
        model = tiny.hunyuan_15_transformer()
        enable(model, tiny.config(dense_layers=tuple(range(LAYERS))))
        with tiny.spy_on_dense() as calls:
            tiny.run(model, tiny.hunyuan_15_inputs(GRID, **condition))
        assert len(calls) == LAYERS
        for shape, mask in calls:
            if len(set(valid)) == 1 and shape[1] == VIDEO + valid[0]:
                assert mask is None
            else:
                assert mask is not None
                assert mask.flatten(1).sum(1).tolist() == [VIDEO + length for length in valid]
        if len(valid) == 1:
            assert {shape[1] for shape, _ in calls} == {VIDEO + valid[0]}

    def test_keys_of_sparse_layers_end_with_each_prompt(self, tiny: ModuleType) -> None:
        model = tiny.hunyuan_15_transformer()
        enable(model, tiny.config())
        with tiny.spy_on_kernel() as masks:
            tiny.run(model, tiny.hunyuan_15_inputs(GRID, (5, 11), (3, 0)))
        assert len(masks) == LAYERS
        for mask in masks:
            assert mask.key_offsets[:, -1].tolist() == [VIDEO + 8, VIDEO + 11]
            assert mask.query_offsets[-1] == VIDEO + 11 + 3

    def test_another_processor_keeps_its_mask(self) -> None:
        processor = object()
        assert HunyuanVideo15Adapter().reroute_processor(processor) is processor


class TestPrepareText:
    def prepare(self, tiny: ModuleType, **condition: Any) -> tuple[Any, dict[str, Any]]:
        arguments = tiny.hunyuan_15_inputs(GRID, **condition)
        return HunyuanVideo15Adapter().prepare_text(arguments), arguments

    def test_text_without_image_or_glyphs_keeps_its_own_tokens_alone(self, tiny: ModuleType) -> None:
        text, arguments = self.prepare(tiny, lengths=(5,))
        assert text.mask_is_full
        assert arguments["encoder_hidden_states"].shape[1] == arguments["encoder_attention_mask"].shape[1] == 5
        assert arguments["encoder_hidden_states_2"].shape[1] == arguments["image_embeds"].shape[1] == 0

    def test_an_empty_text_keeps_one_token_for_the_refiner(self, tiny: ModuleType) -> None:
        text, arguments = self.prepare(tiny, lengths=(0,))
        assert arguments["encoder_hidden_states"].shape[1] == 1
        assert text.lengths.tolist() == [0]

    def test_what_a_pipeline_passes_again_is_read_once(self, tiny: ModuleType) -> None:
        adapter = HunyuanVideo15Adapter()
        prompts = [tiny.hunyuan_15_inputs(GRID, (length,)) for length in (3, 5)]
        for _ in range(3):
            for inputs, length in zip(prompts, (3, 5), strict=True):
                arguments = dict(inputs)
                adapter.prepare_text(arguments)
                assert arguments["encoder_hidden_states"].shape[1] == length
        assert len(adapter._seen) == 2

    def test_a_mask_changed_in_place_is_read_again(self, tiny: ModuleType) -> None:
        adapter, inputs = HunyuanVideo15Adapter(), tiny.hunyuan_15_inputs(GRID, (5,))
        adapter.prepare_text(dict(inputs))
        inputs["encoder_attention_mask"][:, 3:] = 0
        arguments = dict(inputs)
        adapter.prepare_text(arguments)
        assert arguments["encoder_hidden_states"].shape[1] == 3


def test_what_stands_in_the_padding_makes_no_difference(tiny: ModuleType) -> None:
    model, inputs = tiny.hunyuan_15_transformer(), tiny.hunyuan_15_inputs(GRID, (5, 9), (2, 0))
    enable(model, tiny.config())
    expected = tiny.run(model, inputs)
    changed = dict(inputs)
    for text, mask in (("encoder_hidden_states", ""), ("encoder_hidden_states_2", "_2")):
        padding = inputs[f"encoder_attention_mask{mask}"][..., None] == 0
        changed[text] = inputs[text].masked_fill(padding, 100.0)
    torch.testing.assert_close(tiny.run(model, changed), expected, rtol=1e-5, atol=1e-6)


def test_sizes_and_layers_come_from_the_configs() -> None:
    adapter = adapter_for("HunyuanVideo15Transformer3DModel")
    assert adapter.size_multiples({}, {}) == (16, 4)
    assert adapter.num_layers({"num_layers": 5}) == 5


class TestPipeline:
    """A whole text-to-video run with guidance, from given text embeddings."""

    @pytest.fixture
    def pipe(self, tiny: ModuleType) -> HunyuanVideo15Pipeline:
        torch.manual_seed(0)
        pipe = HunyuanVideo15Pipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=tiny.hunyuan_15_transformer(in_channels=9, out_channels=4),
            vae=AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(16,) * 5).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=None,
            tokenizer_2=None,
            guider=ClassifierFreeGuidance(guidance_scale=6.0),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generate(self, tiny: ModuleType, pipe: HunyuanVideo15Pipeline) -> Tensor:
        arguments: dict[str, Any] = {}
        for prefix, length, glyphs in (("", 5, 3), ("negative_", 2, 0)):
            inputs = tiny.hunyuan_15_inputs(GRID, (length,), (glyphs,))
            for suffix in ("", "_2"):
                arguments[f"{prefix}prompt_embeds{suffix}"] = inputs[f"encoder_hidden_states{suffix}"]
                arguments[f"{prefix}prompt_embeds_mask{suffix}"] = inputs[f"encoder_attention_mask{suffix}"]
        return pipe(
            **arguments,
            height=80,
            width=112,
            num_frames=9,
            num_inference_steps=3,
            output_type="latent",
            generator=torch.Generator().manual_seed(3),
        ).frames

    def test_at_sparsity_zero_it_gives_the_same_latents(self, tiny: ModuleType, pipe: HunyuanVideo15Pipeline) -> None:
        dense = self.generate(tiny, pipe)
        enable(pipe, tiny.config(sparsity=0, warmup=1))
        torch.testing.assert_close(self.generate(tiny, pipe), dense, rtol=1e-3, atol=1e-4)
        disable(pipe)
        assert torch.equal(self.generate(tiny, pipe), dense)

    def test_steps_and_branches_are_known(self, tiny: ModuleType, pipe: HunyuanVideo15Pipeline) -> None:
        handle = enable(pipe, tiny.config(warmup=1))
        self.generate(tiny, pipe)
        calls = handle.stats().calls
        assert {(call.step, call.branch) for call in calls} == {
            (step, branch) for step in range(3) for branch in ("pred_cond", "pred_uncond")
        }
        assert len(calls) == 3 * 2 * LAYERS
        assert {call.step for call in calls if call.sparse} == {1, 2}


def test_blocks_compile_to_one_whole_graph(tiny: ModuleType) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model, inputs = tiny.hunyuan_15_transformer(), tiny.hunyuan_15_inputs(GRID, (5, 9), (2, 0))
    expected = tiny.run(model, inputs)
    enable(model, tiny.config(sparsity=0, dense_layers=(1,)))
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(tiny.run(model, inputs), expected, **ROUNDING)
    assert counter.frame_count == 1
