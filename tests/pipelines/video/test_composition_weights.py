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


def run_whole(tiny: ModuleType, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """A forward of the model as a whole where the offloaded one computes: devices differ in their arithmetic."""
    output = run_there(tiny, model.to(DEVICE), inputs)
    model.to("cpu")
    return output


def run_there(tiny: ModuleType, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return tiny.run(model, on_device(inputs)).cpu()


@pytest.mark.parametrize("family", FAMILIES)
class TestOffload:
    def test_models_one_by_one(self, tiny: ModuleType, family: str) -> None:
        model, inputs = model_and_inputs(tiny, family)
        enable(model, tiny.config())
        draft = run_whole(tiny, model, inputs)
        _, hook = accelerate.cpu_offload_with_hook(model, execution_device=DEVICE)
        for _ in range(2):
            torch.testing.assert_close(run_there(tiny, model, inputs), draft, **ROUNDING)
            hook.offload()

    def test_layers_one_by_one(self, tiny: ModuleType, family: str) -> None:
        model, inputs = model_and_inputs(tiny, family)
        dense = run_whole(tiny, model, inputs)
        enable(model, tiny.config())
        draft = run_whole(tiny, model, inputs)
        accelerate.cpu_offload(model, execution_device=DEVICE, offload_buffers=True)
        assert next(model.parameters()).device.type == "meta"
        for _ in range(2):
            torch.testing.assert_close(run_there(tiny, model, inputs), draft, **ROUNDING)
        disable(model)
        torch.testing.assert_close(run_there(tiny, model, inputs), dense, **ROUNDING)

    @pytest.mark.parametrize("by", ["leaf_level", "block_level"])
    def test_groups_of_layers(self, tiny: ModuleType, family: str, by: str) -> None:
        model, inputs = model_and_inputs(tiny, family)
        enable(model, tiny.config())
        draft = run_whole(tiny, model, inputs)
        blocks = {} if by == "leaf_level" else {"num_blocks_per_group": 1}
        model.enable_group_offload(onload_device=DEVICE, offload_device=torch.device("cpu"), offload_type=by, **blocks)
        for _ in range(2):
            torch.testing.assert_close(run_there(tiny, model, inputs), draft, **ROUNDING)


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


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_bitsandbytes_weights(tiny: ModuleType, family: str, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    model, inputs = model_and_inputs(tiny, family)
    exact = run_whole(tiny, model, inputs)
    quantize_with_bitsandbytes(model, bits)
    model.to(DEVICE)
    dense = run_there(tiny, model, inputs)
    with enable(model, tiny.config(sparsity=0)):
        draft = run_there(tiny, model, inputs)
    if bits == 4:
        torch.testing.assert_close(draft, dense, **ROUNDING)
    # activations are brought to 8 bits too, where what differs by rounding may differ by a whole step
    assert (draft - dense).norm() < 0.5 * (dense - exact).norm()
    assert torch.equal(run_there(tiny, model, inputs), dense)


def quantize_with_bitsandbytes(model: nn.Module, bits: int) -> None:
    """Replaces the linear layers that diffusers replaces, which itself does so on a GPU only."""
    import bitsandbytes

    kept: list[str] = type(model)._keep_in_fp32_modules or []
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or any(part in kept for part in name.split(".")):
            continue
        size = layer.in_features, layer.out_features, layer.bias is not None
        if bits == 8:
            quantized = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False)
        else:
            quantized = bitsandbytes.nn.LinearNF4(*size, compute_dtype=torch.float32)
        quantized.load_state_dict(layer.state_dict())
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, quantized)


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
