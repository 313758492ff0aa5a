"""Compiled models: as few graphs as without draft attention, and the same result as without compiling."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from draftattn import TokenGrid, disable, enable
from draftattn.pipelines.video import dispatch

GRID = TokenGrid(3, 5, 7)
STEPS = 4
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # pytest would keep some thousand lines of it
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run_steps(tiny: ModuleType, model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Every step of a run, of which the first two are dense."""
    outputs = []
    for step in range(STEPS):
        with model.cache_context("cond", step_index=step, num_inference_steps=STEPS):
            outputs.append(tiny.run(model, inputs))
    return outputs


def eager_steps(tiny: ModuleType, model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    with enable(model, tiny.config(warmup=2)):
        return run_steps(tiny, model, inputs)


def same(outputs: list[Tensor], expected: list[Tensor]) -> None:
    assert len(outputs) == len(expected)
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, **ROUNDING)


def test_one_graph_serves_all_layers_and_steps_and_a_second_all_sizes(tiny: ModuleType) -> None:
    model, sizes = tiny.wan_transformer(), [GRID, TokenGrid(2, 4, 8), TokenGrid(3, 4, 5)]
    dense = tiny.run(model, tiny.wan_inputs(GRID))
    eager = [eager_steps(tiny, model, tiny.wan_inputs(grid)) for grid in sizes]
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    enable(model, tiny.config(warmup=2))
    graphs = []
    for grid, expected in zip(sizes, eager, strict=True):
        with tiny.spy_on_kernel() as masks:
            same(run_steps(tiny, model, tiny.wan_inputs(grid)), expected)
        assert len(masks) == 2 * 3
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2]
    disable(model)
    torch.testing.assert_close(tiny.run(model, tiny.wan_inputs(GRID)), dense, **ROUNDING)
    graphs = counter.frame_count
    enable(model, tiny.config(warmup=2, sparsity=0.3))
    run_steps(tiny, model, tiny.wan_inputs(GRID))
    assert counter.frame_count == graphs, "other settings compiled anew"


@pytest.mark.parametrize("family", ["hunyuan", "hunyuan_15"])
def test_padded_text_in_a_full_graph(tiny: ModuleType, family: str) -> None:
    model = getattr(tiny, f"{family}_transformer")()
    inputs = getattr(tiny, f"{family}_inputs")(GRID, lengths=(4, 9))
    eager = eager_steps(tiny, model, inputs)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    enable(model, tiny.config(warmup=2))
    with model.cache_context("cond", step_index=0, num_inference_steps=STEPS):
        tiny.run(model, inputs)
    graphs = counter.frame_count
    assert 0 < graphs <= 6  # patch embedding and its reordering, text, two kinds of blocks, one of two layouts
    same(run_steps(tiny, model, inputs), eager)
    assert counter.frame_count == graphs


class TestWholeModel:
    def test_enabled_after_it_was_compiled_and_run(self, tiny: ModuleType) -> None:
        model, inputs = tiny.wan_transformer(num_layers=1), tiny.wan_inputs(GRID)
        dense, eager = tiny.run(model, inputs), eager_steps(tiny, model, inputs)
        counter = CompileCounterWithBackend("eager")
        model.compile(backend=counter)
        torch.testing.assert_close(tiny.run(model, inputs), dense, **ROUNDING)
        handle = enable(model, tiny.config(warmup=2))
        same(run_steps(tiny, model, inputs), eager)
        assert counter.frame_count == 2
        assert len(handle.stats().calls) == STEPS
        disable(model)
        torch.testing.assert_close(tiny.run(model, inputs), dense, **ROUNDING)
        assert counter.frame_count == 2

    def test_the_object_that_torch_compile_returns(self, tiny: ModuleType) -> None:
        model, inputs = tiny.wan_transformer(num_layers=1), tiny.wan_inputs(GRID)
        dense, eager = tiny.run(model, inputs), eager_steps(tiny, model, inputs)
        compiled = torch.compile(model, backend="eager")
        before = tiny.footprint(model)
        enable(compiled, tiny.config(warmup=2))
        same(run_steps(tiny, compiled, inputs), eager)
        disable(compiled)
        assert tiny.footprint(model) == before
        torch.testing.assert_close(tiny.run(compiled, inputs), dense, **ROUNDING)

    def test_a_graph_from_before_that_cannot_reorder_is_an_error(self, tiny: ModuleType) -> None:
        """torch does not look for new hooks on the inner modules of a graph."""
        model, inputs = tiny.wan_transformer(num_layers=1), tiny.wan_inputs(GRID)
        eager = eager_steps(tiny, model, inputs)
        # what ends a graph before the first block, so that it holds no attention
        model.condition_embedder.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        model.compile(backend="eager")
        tiny.run(model, inputs)
        enable(model, tiny.config(warmup=2))
        with pytest.raises(RuntimeError, match=r"compiled before .* at patch_embedding, rope. Call torch.compiler.res"):
            run_steps(tiny, model, inputs)
        torch.compiler.reset()
        same(run_steps(tiny, model, inputs), eager)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_flow(tiny: ModuleType, compiled: bool) -> None:
    """As in the training of a LoRA; a compiled block then breaks its graph at the attention."""
    model, inputs = tiny.wan_transformer(num_layers=1), tiny.wan_inputs(GRID)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        return [parameter.grad.clone() for parameter in model.blocks[0].attn1.parameters()]

    enable(model, tiny.config(sparsity=0))
    draft = gradients()
    if compiled:
        model.compile_repeated_blocks(backend="eager")
        draft = gradients()
    disable(model)
    dense = gradients()
    for a, b in zip(draft, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


class _Doubles(nn.Module):
    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        del key, value
        return ((layer + 1) * (scale or 1) * query).transpose(1, 2).contiguous().transpose(1, 2)


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    owner = _Doubles()
    slot = dispatch.LayerSlot(owner, 4, takes_mask=False)
    query, key, value = torch.randn(3, 2, 7, 3, 8).transpose(2, 3).contiguous().transpose(2, 3).unbind()
    arguments = (query, key, value, slot.number, 0.5)
    assert torch.equal(dispatch._attention_of_slot(*arguments), 2.5 * query)
    torch.library.opcheck(
        dispatch._attention_of_slot,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    if hasattr(torch.Tag, "cudagraph_unsafe"):
        assert torch.Tag.cudagraph_unsafe in torch.ops.draftattn.attention_of_slot.default.tags
