"""With nothing dropped, draft attention changes nothing but the order of tokens on the way."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor, nn

from draftattn import TokenGrid, disable, enable
from draftattn.pipelines.video.hunyuan_video import HunyuanVideoAdapter
from draftattn.pipelines.video.wan import WanAdapter

GRIDS = [TokenGrid(3, 5, 7), TokenGrid(2, 4, 8), TokenGrid(3, 1, 5), TokenGrid(1, 1, 1)]
FAMILIES = [
    "wan",
    "wan batch of 2",
    "wan timestep per token",
    "wan image-to-video",
    "hunyuan",
    "hunyuan padded",
    "hunyuan token replace",
]
# Dense attention and the sparse kernel differ by float32 rounding.
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}


def model_and_inputs(tiny: ModuleType, family: str, grid: TokenGrid) -> tuple[nn.Module, dict[str, Any]]:
    match family:
        case "wan":
            return tiny.wan_transformer(), tiny.wan_inputs(grid)
        case "wan batch of 2":
            return tiny.wan_transformer(), tiny.wan_inputs(grid, batch=2)
        case "wan timestep per token":
            return tiny.wan_transformer(), tiny.wan_inputs(grid, per_token_timesteps=True)
        case "wan image-to-video":
            return tiny.wan_i2v_transformer(), tiny.wan_i2v_inputs(grid)
        case "hunyuan":
            return tiny.hunyuan_transformer(), tiny.hunyuan_inputs(grid, (20,))
        case "hunyuan padded":
            return tiny.hunyuan_transformer(), tiny.hunyuan_inputs(grid, (13, 1, 5))
    return tiny.hunyuan_transformer(image_condition_type="token_replace"), tiny.hunyuan_inputs(grid, (13, 20))


def dense_and_draft(
    tiny: ModuleType, model: nn.Module, inputs: dict[str, Any], **settings: Any
) -> tuple[Tensor, Tensor]:
    dense = tiny.run(model, inputs)
    enable(model, tiny.config(**{"sparsity": 0, **settings}))
    return dense, tiny.run(model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_sparsity_zero_equals_dense(tiny: ModuleType, family: str, grid: TokenGrid) -> None:
    dense, draft = dense_and_draft(tiny, *model_and_inputs(tiny, family, grid))
    torch.testing.assert_close(draft, dense, **ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_layers_on_permuted_tokens_equal_dense(tiny: ModuleType, family: str) -> None:
    model, inputs = model_and_inputs(tiny, family, GRIDS[0])
    every_layer = range(4 if "hunyuan" in family else 3)
    with tiny.spy_on_kernel() as masks:
        dense, draft = dense_and_draft(tiny, model, inputs, sparsity=0.9, dense_layers=every_layer)
    assert not masks
    torch.testing.assert_close(draft, dense, **ROUNDING)


@pytest.mark.parametrize("family", ["wan", "hunyuan padded"])
@pytest.mark.parametrize("tile", [(1, 4, 4), (1, 3, 5), (2, 2, 4), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("settings", [{"residual": False}, {"selection": "head"}], ids=str)
def test_any_tile_and_selection_equals_dense(
    tiny: ModuleType, family: str, tile: tuple[int, int, int], settings: dict
) -> None:
    model, inputs = model_and_inputs(tiny, family, GRIDS[0])
    dense, draft = dense_and_draft(tiny, model, inputs, tile=tile, **settings)
    torch.testing.assert_close(draft, dense, **ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_blocks_does_change_the_output(tiny: ModuleType, family: str) -> None:
    dense, draft = dense_and_draft(tiny, *model_and_inputs(tiny, family, GRIDS[0]), sparsity=0.6)
    assert draft.isfinite().all()
    assert (draft - dense).abs().max() > 1e-3
    assert (draft - dense).norm() < dense.norm()


@pytest.mark.parametrize(("adapter", "family"), [(WanAdapter, "wan"), (HunyuanVideoAdapter, "hunyuan padded")])
def test_leaving_out_the_rotary_table_would_be_caught(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, adapter: type, family: str
) -> None:
    without_rope = tuple(site for site in adapter.token_sites if site.name != "rope")  # type: ignore[attr-defined]
    assert len(without_rope) == 2
    monkeypatch.setattr(adapter, "token_sites", without_rope)
    dense, draft = dense_and_draft(tiny, *model_and_inputs(tiny, family, GRIDS[0]))
    assert (draft - dense).abs().max() > 1e-3


def test_mixing_frames_under_a_timestep_per_token_would_be_caught(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanAdapter, "frame_order_reason", lambda *_: None)
    model, inputs = model_and_inputs(tiny, "wan timestep per token", GRIDS[0])
    dense, draft = dense_and_draft(tiny, model, inputs, tile=(3, 2, 2))
    assert (draft - dense).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["wan", "hunyuan padded"])
class TestComposition:
    def test_positional_arguments(self, tiny: ModuleType, family: str) -> None:
        model, inputs = model_and_inputs(tiny, family, GRIDS[0])
        dense = tiny.run(model, inputs)
        enable(model, tiny.config(sparsity=0))
        positional = [inputs.pop(name) for name in list(inputs)[:3]]
        with torch.no_grad():
            torch.testing.assert_close(model(*positional, **inputs)[0], dense, **ROUNDING)

    def test_grids_may_change_from_call_to_call(self, tiny: ModuleType, family: str) -> None:
        model, _ = model_and_inputs(tiny, family, GRIDS[0])
        inputs = [model_and_inputs(tiny, family, grid)[1] for grid in (*GRIDS, GRIDS[0])]
        dense = [tiny.run(model, each) for each in inputs]
        enable(model, tiny.config(sparsity=0))
        for each, expected in zip(inputs, dense, strict=True):
            torch.testing.assert_close(tiny.run(model, each), expected, **ROUNDING)

    @pytest.mark.parametrize("when", ["before", "after the first call"])
    def test_lora_on_every_site_and_projection(self, tiny: ModuleType, family: str, when: str) -> None:
        peft = pytest.importorskip("peft")
        model, inputs = model_and_inputs(tiny, family, GRIDS[0])
        plain = tiny.run(model, inputs)
        lora = peft.LoraConfig(
            r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_out"], init_lora_weights=False
        )
        if when == "before":
            model.add_adapter(lora)
            dense, draft = dense_and_draft(tiny, model, inputs)
        else:
            enable(model, tiny.config(sparsity=0))
            tiny.run(model, inputs)
            torch.manual_seed(0)
            model.add_adapter(lora)
            draft = tiny.run(model, inputs)
            disable(model)
            dense = tiny.run(model, inputs)
        assert (dense - plain).abs().max() > 1e-2
        torch.testing.assert_close(draft, dense, **ROUNDING)
        enable(model, tiny.config(sparsity=0))
        tiny.run(model, inputs)
        model.delete_adapters("default")
        model.unload_lora()
        torch.testing.assert_close(tiny.run(model, inputs), plain, **ROUNDING)
        disable(model)
        assert torch.equal(tiny.run(model, inputs), plain)

    def test_layerwise_casting(self, tiny: ModuleType, family: str) -> None:
        model, inputs = model_and_inputs(tiny, family, GRIDS[0])
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        dense, draft = dense_and_draft(tiny, model, inputs)
        torch.testing.assert_close(draft, dense, **ROUNDING)

    def test_first_block_cache(self, tiny: ModuleType, family: str) -> None:
        """The skipped steps add a residual stored in blocked order, so it has to stay in that order."""
        model, inputs = model_and_inputs(tiny, family, GRIDS[0])

        def two_steps() -> list[Tensor]:
            with model.cache_context("cond"):
                first = tiny.run(model, inputs)
                second = tiny.run(model, {**inputs, "hidden_states": inputs["hidden_states"] * 1.01})
            model._reset_stateful_cache()
            return [first, second]

        uncached = two_steps()[1]
        model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        dense = two_steps()
        assert not torch.equal(dense[1], uncached), "the cache was never used"
        enable(model, tiny.config(sparsity=0))
        with tiny.spy_on_kernel() as masks:
            draft = two_steps()
        assert len(masks) < 2 * (3 if family == "wan" else 4)
        for a, b in zip(draft, dense, strict=True):
            torch.testing.assert_close(a, b, **ROUNDING)

    def test_bfloat16(self, tiny: ModuleType, family: str) -> None:
        model, inputs = model_and_inputs(tiny, family, GRIDS[0])
        model.to(torch.bfloat16)
        inputs = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        dense, draft = dense_and_draft(tiny, model, inputs)
        assert draft.dtype == torch.bfloat16
        assert (draft - dense).float().norm() < 0.02 * dense.float().norm()


def test_fused_projections_on_wan(tiny: ModuleType) -> None:
    model, inputs = model_and_inputs(tiny, "wan", GRIDS[0])
    dense = tiny.run(model, inputs)
    enable(model, tiny.config(sparsity=0))
    model.fuse_qkv_projections()
    assert hasattr(model.blocks[0].attn1, "to_qkv")
    torch.testing.assert_close(tiny.run(model, inputs), dense, **ROUNDING)


@pytest.mark.parametrize("make", ["wan_pipeline", "wan_i2v_pipeline", "hunyuan_pipeline"])
def test_a_whole_pipeline_at_sparsity_zero_gives_the_same_latents(tiny: ModuleType, make: str) -> None:
    pipe = getattr(tiny, make)()
    dense = tiny.generate(pipe, num_inference_steps=2)
    enable(pipe, tiny.config(sparsity=0, warmup=1))
    torch.testing.assert_close(tiny.generate(pipe, num_inference_steps=2), dense, rtol=1e-3, atol=1e-4)
    disable(pipe)
    assert torch.equal(tiny.generate(pipe, num_inference_steps=2), dense)


def test_a_pipeline_decodes_a_video_while_enabled(tiny: ModuleType) -> None:
    pipe = tiny.wan_pipeline()
    enable(pipe, tiny.config())
    video = tiny.generate(pipe, num_inference_steps=1, guidance_scale=1.0, output_type="np")
    assert video.shape == (1, 9, 80, 112, 3)
