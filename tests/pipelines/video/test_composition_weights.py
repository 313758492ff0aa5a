"""Where weights are, how they are stored and what is added to them makes no difference."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from draftattn import TokenGrid, disable, enable

GRID = TokenGrid(3, 5, 7)
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = ["wan", "hunyuan", "hunyuan_15"]


def model_and_inputs(tiny: ModuleType, family: str) -> tuple[nn.Module, dict[str, Any]]:
    return getattr(tiny, f"{family}_transformer")(), getattr(tiny, f"{family}_inputs")(GRID)


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
class TestOffload:
    def test_models_one_by_one(self, tiny: ModuleType, family: str) -> None:
        model, inputs = model_and_inputs(tiny, family)
        enable(model, tiny.config())
        draft = tiny.run(model, inputs)
        _, hook = accelerate.cpu_offload_with_hook(model, execution_device=DEVICE)
        for _ in range(2):
            torch.testing.assert_close(tiny.run(model, on_device(inputs)).cpu(), draft, **ROUNDING)
            hook.offload()

    def test_layers_one_by_one(self, tiny: ModuleType, family: str) -> None:
        model, inputs = model_and_inputs(tiny, family)
        dense = tiny.run(model, inputs)
        enable(model, tiny.config())
        draft = tiny.run(model, inputs)
        accelerate.cpu_offload(model, execution_device=DEVICE, offload_buffers=True)
        assert next(model.parameters()).device.type == "meta"
        for _ in range(2):
            torch.testing.assert_close(tiny.run(model, on_device(inputs)).cpu(), draft, **ROUNDING)
        disable(model)
        torch.testing.assert_close(tiny.run(model, on_device(inputs)).cpu(), dense, **ROUNDING)

    @pytest.mark.parametrize("by", ["leaf_level", "block_level"])
    def test_groups_of_layers(self, tiny: ModuleType, family: str, by: str) -> None:
        model, inputs = model_and_inputs(tiny, family)
        enable(model, tiny.config())
        draft = tiny.run(model, inputs)
        blocks = {} if by == "leaf_level" else {"num_blocks_per_group": 1}
        model.enable_group_offload(onload_device=DEVICE, offload_device=torch.device("cpu"), offload_type=by, **blocks)
        for _ in range(2):
            torch.testing.assert_close(tiny.run(model, on_device(inputs)).cpu(), draft, **ROUNDING)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="diffusers offloads whole pipelines from an accelerator only")
@pytest.mark.parametrize("kind", ["model", "sequential"])
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_offload_of_a_pipeline(tiny: ModuleType, family: str, kind: str) -> None:
    pipe = getattr(tiny, f"{family}_pipeline")().to(DEVICE)
    enable(pipe, tiny.config(warmup=1))
    draft = tiny.generate(pipe).cpu()
    pipe.to("cpu")
    getattr(pipe, f"enable_{kind}_cpu_offload")(device=DEVICE)
    for _ in range(2):
        torch.testing.assert_close(tiny.generate(pipe).cpu(), draft, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layerwise_casting_to_8_bits(tiny: ModuleType, family: str) -> None:
    model, inputs = model_and_inputs(tiny, family)
    exact = tiny.run(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dense = tiny.run(model, inputs)
    assert not torch.equal(dense, exact)
    enable(model, tiny.config(sparsity=0))
    torch.testing.assert_close(tiny.run(model, inputs), dense, **ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_torchao_weights(tiny: ModuleType, family: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = model_and_inputs(tiny, family)
    exact = tiny.run(model, inputs)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    dense = tiny.run(model, inputs)
    assert not torch.equal(dense, exact)
    with enable(model, tiny.config(sparsity=0)):
        torch.testing.assert_close(tiny.run(model, inputs), dense, **ROUNDING)
    assert torch.equal(tiny.run(model, inputs), dense)


class TestLoRA:
    """As users have it: a file, loaded into a pipeline, perhaps fused."""

    @pytest.fixture
    def lora(self, tiny: ModuleType, tmp_path: Path) -> Path:
        peft = pytest.importorskip("peft")
        pipe = tiny.wan_pipeline()
        torch.manual_seed(5)
        pipe.transformer.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        )
        layers = peft.get_peft_model_state_dict(pipe.transformer)
        type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=layers)
        return tmp_path

    @pytest.mark.parametrize("when", ["before enable", "while enabled"])
    def test_load_fuse_and_unload(self, tiny: ModuleType, lora: Path, when: str) -> None:
        pipe = tiny.wan_pipeline()
        plain = tiny.generate(pipe, num_inference_steps=2)
        pipe.load_lora_weights(lora)
        dense = tiny.generate(pipe, num_inference_steps=2)
        assert (dense - plain).abs().max() > 1e-2

        pipe = tiny.wan_pipeline()
        if when == "before enable":
            pipe.load_lora_weights(lora)
        enable(pipe, tiny.config(sparsity=0, warmup=1))
        tiny.generate(pipe, num_inference_steps=2)
        if when == "while enabled":
            pipe.load_lora_weights(lora)
        close = {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(tiny.generate(pipe, num_inference_steps=2), dense, **close)
        pipe.fuse_lora()
        torch.testing.assert_close(tiny.generate(pipe, num_inference_steps=2), dense, **close)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(tiny.generate(pipe, num_inference_steps=2), plain, **close)

    def test_training_one_while_enabled(self, tiny: ModuleType) -> None:
        peft = pytest.importorskip("peft")
        model, inputs = tiny.wan_transformer(), tiny.wan_inputs(GRID)
        torch.manual_seed(5)
        model.requires_grad_(False)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def gradients() -> list[torch.Tensor]:
            model.zero_grad()
            model(**inputs)[0].square().mean().backward()
            return [parameter.grad.clone() for parameter in trained]

        dense = gradients()
        enable(model, tiny.config(sparsity=0))
        for a, b in zip(gradients(), dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_fused_projections_with_a_whole_pipeline(tiny: ModuleType) -> None:
    pipe = tiny.wan_pipeline()
    dense = tiny.generate(pipe, num_inference_steps=2)
    pipe.transformer.fuse_qkv_projections()
    enable(pipe, tiny.config(sparsity=0, warmup=1))
    torch.testing.assert_close(tiny.generate(pipe, num_inference_steps=2), dense, rtol=1e-3, atol=1e-4)
    pipe.transformer.unfuse_qkv_projections()
    torch.testing.assert_close(tiny.generate(pipe, num_inference_steps=2), dense, rtol=1e-3, atol=1e-4)
