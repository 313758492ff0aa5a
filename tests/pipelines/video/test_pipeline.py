"""Loading a pipeline with draft attention, and refusing what cannot work before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline, WanPipeline

from draftattn import DraftAttentionPipeline, DraftConfig, InputError, disable, enable, preset
from draftattn.pipelines.video.checks import check_request
from draftattn.pipelines.video.pipeline import check_model


@pytest.fixture(scope="module")
def folder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Wan pipeline."""
    path = tmp_path_factory.mktemp("tiny-wan")
    tiny.wan_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands in for what loads weights."""
    spy = Mock(side_effect=AssertionError("weights were about to be loaded"))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", spy)
    return spy


def write_index(folder: Path, **index: Any) -> Path:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline", **index}))
    return folder


class TestLoading:
    def test_gives_the_stock_class_enabled(self, tiny: ModuleType, folder: Path) -> None:
        pipe = DraftAttentionPipeline.from_pretrained(folder, draft=tiny.config(warmup=1))
        assert type(pipe) is WanPipeline
        pipe.set_progress_bar_config(disable=True)
        tiny.generate(pipe, num_inference_steps=3, guidance_scale=1.0)
        stats = pipe.draft.stats()
        assert [call.sparse for call in stats.calls] == [False] * 3 + [True] * 6
        assert 0 < stats.density < 1

    def test_generates_what_the_stock_pipeline_enabled_by_hand_does(self, tiny: ModuleType, folder: Path) -> None:
        loaded = DraftAttentionPipeline.from_pretrained(str(folder), draft=tiny.config(), local_files_only=True)
        stock = WanPipeline.from_pretrained(folder)
        for pipe in (loaded, stock):
            pipe.set_progress_bar_config(disable=True)
        dense = tiny.generate(stock, num_inference_steps=2)
        enable(stock, tiny.config())
        assert torch.equal(tiny.generate(loaded, num_inference_steps=2), tiny.generate(stock, num_inference_steps=2))
        disable(loaded)
        assert torch.equal(tiny.generate(loaded, num_inference_steps=2), dense)

    @pytest.mark.parametrize("name", ["fast", "published-wan-75"])
    def test_takes_a_preset_by_name(self, folder: Path, name: str) -> None:
        pipe = DraftAttentionPipeline.from_pretrained(folder, draft=name)
        assert pipe.draft.config == preset(name)

    def test_without_settings_takes_the_defaults(self, folder: Path) -> None:
        assert DraftAttentionPipeline.from_pretrained(folder).draft.config == DraftConfig()

    def test_passes_the_rest_on_to_diffusers(self, folder: Path) -> None:
        pipe = DraftAttentionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, vae=None)
        assert pipe.transformer.dtype == torch.bfloat16
        assert pipe.vae is None

    def test_both_transformers_are_enabled(self, tiny: ModuleType, tmp_path: Path) -> None:
        transformers = tiny.wan_transformer(), tiny.wan_transformer(seed=1)
        tiny.wan_pipeline(*transformers, boundary_ratio=0.88).save_pretrained(tmp_path)
        pipe = DraftAttentionPipeline.from_pretrained(tmp_path, draft=tiny.config())
        pipe.set_progress_bar_config(disable=True)
        tiny.generate(pipe, guidance_scale=1.0)
        assert {call.transformer for call in pipe.draft.stats().calls} == {"transformer", "transformer_2"}
        assert "transformer_2" in repr(pipe.draft)

    def test_a_saved_hunyuan_pipeline(self, tiny: ModuleType, tmp_path: Path) -> None:
        tiny.hunyuan_pipeline().save_pretrained(tmp_path)
        pipe = DraftAttentionPipeline.from_pretrained(tmp_path, draft=tiny.config())
        assert type(pipe).__name__ == "HunyuanVideoPipeline"
        pipe.set_progress_bar_config(disable=True)
        tiny.generate(pipe, num_inference_steps=1)
        assert pipe.draft.stats().num_sparse_calls == 4


class TestRefusedBeforeLoading:
    @pytest.mark.parametrize("value", [False, None])
    def test_weights_that_are_not_safetensors(self, folder: Path, loader: Mock, value: bool | None) -> None:
        with pytest.raises(InputError, match=f"use_safetensors is {value}; only safetensors"):
            DraftAttentionPipeline.from_pretrained(folder, use_safetensors=value)
        loader.assert_not_called()

    def test_safetensors_are_asked_for(self, folder: Path, loader: Mock) -> None:
        with pytest.raises(AssertionError, match="about to be loaded"):
            DraftAttentionPipeline.from_pretrained(folder)
        assert loader.call_args.kwargs["use_safetensors"] is True

    def test_a_folder_with_pickled_weights_only(self, tiny: ModuleType, tmp_path: Path) -> None:
        tiny.wan_pipeline().save_pretrained(tmp_path, safe_serialization=False)
        for path in tmp_path.rglob("*.safetensors"):
            path.unlink()
        with pytest.raises(InputError, match="safetensors"):
            DraftAttentionPipeline.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", ["missing", "./missing/model", "/missing/model", "a/b/c", "~/missing", ""])
    def test_a_missing_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: Mock, name: str) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=r"is not a folder|has no model_index"):
            DraftAttentionPipeline.from_pretrained(name)
        loader.assert_not_called()

    def test_a_repository_that_cannot_be_reached(self, tmp_path: Path, loader: Mock) -> None:
        with pytest.raises(InputError, match="model 'some/where' is no folder here and could not be read") as caught:
            DraftAttentionPipeline.from_pretrained("some/where", local_files_only=True, cache_dir=tmp_path)
        assert "\n" not in str(caught.value)
        loader.assert_not_called()

    def test_a_folder_without_an_index(self, tmp_path: Path, loader: Mock) -> None:
        with pytest.raises(InputError, match=r"has no model_index.json; it must be in diffusers' layout"):
            DraftAttentionPipeline.from_pretrained(tmp_path)
        loader.assert_not_called()

    @pytest.mark.parametrize("index", [{}, {"transformer": [None, None]}, {"unet": ["diffusers", "UNet"]}], ids=str)
    def test_a_pipeline_without_a_transformer(self, tmp_path: Path, loader: Mock, index: dict) -> None:
        with pytest.raises(InputError, match=r"SomePipeline has no transformer.*WanTransformer3DModel"):
            DraftAttentionPipeline.from_pretrained(write_index(tmp_path, **index))
        loader.assert_not_called()

    def test_an_unsupported_transformer_lists_those_that_are(self, tmp_path: Path, loader: Mock) -> None:
        write_index(tmp_path, transformer=["diffusers", "CogVideoXTransformer3DModel"])
        with pytest.raises(InputError, match="CogVideoXTransformer3DModel is not supported") as caught:
            DraftAttentionPipeline.from_pretrained(tmp_path)
        assert "HunyuanVideoTransformer3DModel, WanTransformer3DModel" in str(caught.value)
        loader.assert_not_called()

    @pytest.mark.parametrize("draft", ["turbo", 0.5])
    def test_unknown_settings(self, folder: Path, loader: Mock, draft: Any) -> None:
        with pytest.raises(InputError, match=repr(draft)):
            DraftAttentionPipeline.from_pretrained(folder, draft=draft)
        loader.assert_not_called()


class TestEnableRefuses:
    def test_another_model(self) -> None:
        model = CogVideoXTransformer3DModel(num_attention_heads=1, attention_head_dim=16, num_layers=1)
        with pytest.raises(InputError, match=r"CogVideoXTransformer3DModel is not supported.*WanTransformer3DModel"):
            enable(model)

    def test_something_without_a_transformer(self) -> None:
        with pytest.raises(InputError, match="object has no transformer"):
            enable(object())

    @pytest.mark.parametrize("layer", [3, -4])
    def test_a_layer_that_is_not_there(self, tiny: ModuleType, layer: int) -> None:
        with pytest.raises(InputError, match=f"dense_layers names layer {layer}; the transformer has layers 0 to 2"):
            enable(tiny.wan_transformer(), tiny.config(dense_layers=(layer,)))

    def test_nothing_of_a_pipeline_is_enabled_if_one_transformer_cannot_be(self, tiny: ModuleType) -> None:
        pipe = tiny.wan_pipeline(tiny.wan_transformer(), tiny.wan_transformer(seed=1), boundary_ratio=0.5)
        pipe.transformer_2.blocks[0].attn1.set_processor(lambda *args, **kwargs: None)
        before = [tiny.footprint(pipe.transformer), tiny.footprint(pipe.transformer_2)]
        with pytest.raises(InputError, match="transformer_2 attention layer 0"):
            enable(pipe, tiny.config())
        assert [tiny.footprint(pipe.transformer), tiny.footprint(pipe.transformer_2)] == before
        assert not hasattr(pipe, "draft")


class TestCheckRequest:
    """The tiny Wan pipeline compresses 8 times and patches by 2 in space, and 4 times in time."""

    @pytest.mark.parametrize(
        "size",
        [{}, {"height": 16, "width": 32}, {"height": 480, "width": 832, "num_frames": 81}, {"num_frames": 1}],
        ids=str,
    )
    def test_sizes_the_pipeline_takes(self, folder: Path, size: dict[str, int]) -> None:
        check_request(folder, check_model(folder), DraftConfig(), **size)

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ({"height": 250}, "height is 250; this model takes multiples of 16, such as 256"),
            ({"width": 8}, "width is 8; this model takes multiples of 16, such as 16"),
            ({"width": 0}, "width is 0; .* such as 16"),
            ({"height": -16}, "height is -16; .* such as 16"),
            ({"num_frames": 80}, "frames is 80; this model takes 1 plus a multiple of 4, such as 81"),
            ({"num_frames": 0}, "frames is 0; .* such as 1$"),
        ],
        ids=str,
    )
    def test_sizes_it_would_refuse_or_round(self, folder: Path, size: dict[str, int], message: str) -> None:
        with pytest.raises(InputError, match=message):
            check_request(folder, check_model(folder), DraftConfig(), **size)

    def test_a_layer_that_is_not_there(self, folder: Path, loader: Mock) -> None:
        with pytest.raises(InputError, match="dense_layers names layer 3"):
            check_request(folder, check_model(folder), DraftConfig(dense_layers=(3,)))
        loader.assert_not_called()
