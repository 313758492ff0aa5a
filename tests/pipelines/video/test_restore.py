"""`disable` leaves no trace, whatever happened in between."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from draftattn import InputError, TokenGrid, disable, enable

GRID = TokenGrid(3, 5, 7)


@pytest.fixture(params=["wan", "hunyuan"])
def model(request: pytest.FixtureRequest, tiny: ModuleType) -> nn.Module:
    return tiny.wan_transformer() if request.param == "wan" else tiny.hunyuan_transformer()


@pytest.fixture
def inputs(model: nn.Module, tiny: ModuleType) -> dict[str, Any]:
    wan = type(model).__name__.startswith("Wan")
    return tiny.wan_inputs(GRID) if wan else tiny.hunyuan_inputs(GRID, (9, 20))


def attention_of(model: nn.Module) -> nn.Module:
    """The self-attention of the last layer."""
    return model.blocks[-1].attn1 if hasattr(model, "blocks") else model.single_transformer_blocks[-1].attn


def failing(error: BaseException) -> Callable[..., None]:
    def raise_it(*_: Any) -> None:
        raise error

    return raise_it


class TestDisable:
    def test_leaves_nothing_behind(self, tiny: ModuleType, model: nn.Module, inputs: dict) -> None:
        before, dense = tiny.footprint(model), tiny.run(model, inputs)
        enable(model, tiny.config())
        assert not torch.equal(tiny.run(model, inputs), dense)
        assert tiny.footprint(model) != before
        disable(model)
        assert tiny.footprint(model) == before
        assert torch.equal(tiny.run(model, inputs), dense)

    def test_keeps_a_backend_chosen_before(self, tiny: ModuleType, model: nn.Module, inputs: dict) -> None:
        model.set_attention_backend("native")
        before, dense = tiny.footprint(model), tiny.run(model, inputs)
        assert attention_of(model).processor._attention_backend is not None
        enable(model, tiny.config())
        tiny.run(model, inputs)
        # between calls, too, the processors are the user's
        assert attention_of(model).processor._attention_backend == "native"
        disable(model)
        assert tiny.footprint(model) == before
        assert torch.equal(tiny.run(model, inputs), dense)

    def test_twice_or_without_enable_does_nothing(self, tiny: ModuleType, model: nn.Module) -> None:
        before = tiny.footprint(model)
        disable(model)
        enable(model, tiny.config())
        disable(model)
        disable(model)
        assert tiny.footprint(model) == before

    def test_through_the_handle_or_its_context(self, tiny: ModuleType, model: nn.Module, inputs: dict) -> None:
        before, dense = tiny.footprint(model), tiny.run(model, inputs)
        handle = enable(model, tiny.config())
        handle.disable()
        assert tiny.footprint(model) == before
        with enable(model, tiny.config()):
            assert not torch.equal(tiny.run(model, inputs), dense)
        assert tiny.footprint(model) == before
        assert torch.equal(tiny.run(model, inputs), dense)

    def test_of_a_pipeline_restores_all_transformers_and_the_attribute(self, tiny: ModuleType) -> None:
        pipe = tiny.wan_pipeline(tiny.wan_transformer(), tiny.wan_transformer(seed=1), boundary_ratio=0.9)
        before = [tiny.footprint(pipe.transformer), tiny.footprint(pipe.transformer_2)]
        attributes = sorted(vars(pipe))
        handle = enable(pipe, tiny.config())
        assert pipe.draft is handle
        disable(pipe)
        assert [tiny.footprint(pipe.transformer), tiny.footprint(pipe.transformer_2)] == before
        assert sorted(vars(pipe)) == attributes


class TestEnableAgain:
    def test_replaces_the_settings(self, tiny: ModuleType, model: nn.Module, inputs: dict) -> None:
        before, dense = tiny.footprint(model), tiny.run(model, inputs)
        enable(model, tiny.config(sparsity=0.9))
        rough = tiny.run(model, inputs)
        handle = enable(model, tiny.config(sparsity=0))
        torch.testing.assert_close(tiny.run(model, inputs), dense, rtol=1e-4, atol=2e-5)
        assert handle.stats().density == 1.0
        enable(model, tiny.config(sparsity=0.9))
        assert torch.equal(tiny.run(model, inputs), rough)
        disable(model)
        assert tiny.footprint(model) == before

    def test_disabling_by_an_old_handle_leaves_the_new_one_whole(
        self, tiny: ModuleType, model: nn.Module, inputs: dict
    ) -> None:
        old = enable(model, tiny.config(warmup=1))
        new = enable(model, tiny.config(warmup=1))
        old.disable()
        with model.cache_context("cond", step_index=3, num_inference_steps=8):
            tiny.run(model, inputs)
        assert {(call.step, call.branch, call.sparse) for call in new.stats().calls} == {(3, "cond", True)}

    def test_refused_settings_leave_the_old_ones(self, tiny: ModuleType, model: nn.Module, inputs: dict) -> None:
        enable(model, tiny.config())
        before = tiny.run(model, inputs)
        with pytest.raises(InputError, match="dense_layers names layer 99"):
            enable(model, tiny.config(dense_layers=(99,)))
        assert torch.equal(tiny.run(model, inputs), before)


@pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("place", ["attention", "proj_out", "after the first layer"])
class TestAfterAnError:
    def interrupt(self, tiny: ModuleType, model: nn.Module, inputs: dict, error: BaseException, place: str) -> None:
        module = {
            "attention": attention_of(model),
            "proj_out": model.proj_out,
            "after the first layer": next(iter(model.children())),
        }[place]
        hook = module.register_forward_pre_hook(failing(error))
        with pytest.raises(type(error)):
            tiny.run(model, inputs)
        hook.remove()

    def test_disable_restores(
        self, tiny: ModuleType, model: nn.Module, inputs: dict, error: BaseException, place: str
    ) -> None:
        before, dense = tiny.footprint(model), tiny.run(model, inputs)
        enable(model, tiny.config())
        self.interrupt(tiny, model, inputs, error, place)
        disable(model)
        assert tiny.footprint(model) == before
        assert torch.equal(tiny.run(model, inputs), dense)

    def test_the_next_call_is_as_if_nothing_had_happened(
        self, tiny: ModuleType, model: nn.Module, inputs: dict, error: BaseException, place: str
    ) -> None:
        before, dense = tiny.footprint(model), tiny.run(model, inputs)
        enable(model, tiny.config())
        draft = tiny.run(model, inputs)
        self.interrupt(tiny, model, inputs, error, place)
        if not isinstance(error, KeyboardInterrupt):
            assert attention_of(model).processor._attention_backend is None
        assert torch.equal(tiny.run(model, inputs), draft)
        disable(model)
        assert tiny.footprint(model) == before
        assert torch.equal(tiny.run(model, inputs), dense)


@pytest.mark.parametrize("when", ["before enable", "while enabled"])
def test_offload_hooks_may_come_and_go(tiny: ModuleType, model: nn.Module, inputs: dict, when: str) -> None:
    """As `enable_model_cpu_offload` does at the end of every run."""

    def reinstall() -> None:
        remove_hook_from_module(model, recurse=True)
        add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    dense = tiny.run(model, inputs)
    reinstall()
    remove_hook_from_module(model, recurse=True)  # leaves an attribute of its own
    before = tiny.footprint(model)
    if when == "before enable":
        reinstall()
    enable(model, tiny.config())
    draft = tiny.run(model, inputs)
    assert not torch.equal(draft, dense)
    for _ in range(2):
        reinstall()
        assert torch.equal(tiny.run(model, inputs), draft)
    disable(model)
    assert torch.equal(tiny.run(model, inputs), dense)
    remove_hook_from_module(model, recurse=True)
    assert tiny.footprint(model) == before


def test_group_offload_while_enabled(tiny: ModuleType, model: nn.Module, inputs: dict) -> None:
    enable(model, tiny.config())
    draft = tiny.run(model, inputs)
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(tiny.run(model, inputs), draft)


def test_saving_while_enabled_saves_the_model(tiny: ModuleType, model: nn.Module, inputs: dict, tmp_path: Path) -> None:
    dense = tiny.run(model, inputs)
    enable(model, tiny.config())
    tiny.run(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    assert torch.equal(tiny.run(loaded, inputs), dense)


def test_saving_a_pipeline_while_enabled(tiny: ModuleType, tmp_path: Path) -> None:
    pipe = tiny.wan_pipeline()
    enable(pipe, tiny.config())
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert not hasattr(loaded, "draft")
    assert all(
        torch.equal(a, b) for a, b in zip(pipe.transformer.parameters(), loaded.transformer.parameters(), strict=True)
    )


def test_one_processor_shared_by_all_layers(tiny: ModuleType) -> None:
    """`set_attn_processor(processor)` gives every module the same object, cross-attention included."""
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs(GRID)
    expected = tiny.run(model, inputs)
    enable(model, tiny.config(dense_layers=(1,)))
    draft = tiny.run(model, inputs)
    disable(model)
    shared = type(model.blocks[0].attn1.processor)()
    model.set_attn_processor(shared)
    enable(model, tiny.config(dense_layers=(1,)))
    assert torch.equal(tiny.run(model, inputs), draft)
    disable(model)
    assert model.blocks[1].attn1.processor is model.blocks[0].attn2.processor is shared
    assert not vars(shared)
    assert torch.equal(tiny.run(model, inputs), expected)


def test_a_processor_outside_the_dispatcher_is_refused_and_nothing_stays(tiny: ModuleType) -> None:
    model = tiny.wan_transformer()
    model.blocks[1].attn1.set_processor(lambda *args, **kwargs: None)
    before = tiny.footprint(model)
    with pytest.raises(InputError, match="transformer attention layer 1 has the processor function"):
        enable(model, tiny.config())
    assert tiny.footprint(model) == before


def test_a_processor_replaced_after_an_interrupt_stays(tiny: ModuleType) -> None:
    model, inputs = tiny.wan_transformer(), tiny.wan_inputs(GRID)
    enable(model, tiny.config())
    model.blocks[2].register_forward_pre_hook(failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        tiny.run(model, inputs)
    chosen = type(model.blocks[0].attn1.processor)()
    model.blocks[0].attn1.set_processor(chosen)
    disable(model)
    assert model.blocks[0].attn1.processor is chosen


@pytest.mark.parametrize("whole_pipeline", [True, False], ids=["pipeline", "transformer"])
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_what_is_deleted_is_freed_at_once(tiny: ModuleType, family: str, whole_pipeline: bool) -> None:
    """No reference cycle runs through the model: its gigabytes must not wait for the garbage collector.

    The forward is called by itself, since diffusers' own ``cache_context`` makes such a cycle.
    """
    owner = getattr(tiny, f"{family}_{'pipeline' if whole_pipeline else 'transformer'}")()
    model = owner.transformer if whole_pipeline else owner
    inputs = tiny.wan_inputs(GRID) if family == "wan" else tiny.hunyuan_inputs(GRID)
    transformer = weakref.ref(model)
    enable(owner, tiny.config())
    tiny.run(model, inputs)
    gc.collect()
    gc.disable()
    try:
        del model, owner
        assert transformer() is None
    finally:
        gc.enable()
