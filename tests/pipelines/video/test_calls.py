"""Which attention calls are sparse: exactly those that the settings say."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from draftattn import InputError, TokenGrid, disable, enable

GRID = TokenGrid(3, 5, 7)
STEPS = 4


def sparse_calls(tiny: ModuleType, pipe: Any, config: Any, **arguments: Any) -> tuple[Counter, Counter, int]:
    """How often each (transformer, step, branch, layer) was sparse and dense, and the kernel calls."""
    handle = enable(pipe, config)
    with tiny.spy_on_kernel() as masks:
        tiny.generate(pipe, num_inference_steps=STEPS, **arguments)
    sparse, dense = Counter(), Counter()
    for call in handle.stats().calls:
        (sparse if call.sparse else dense)[call.transformer, call.step, call.branch, call.layer] += 1
    return sparse, dense, len(masks)


def every(steps: range, branches: list[str | None], layers: list[int], name: str = "transformer") -> Counter:
    return Counter((name, step, branch, layer) for step in steps for branch in branches for layer in layers)


BOTH = ["cond", "uncond"]


class TestWan:
    @pytest.mark.parametrize(
        ("warmup", "first_sparse"), [(0, 0), (0.0, 0), (1, 1), (3, 3), (0.25, 1), (0.3, 2), (1.0, 4), (9, 4)]
    )
    def test_warm_up(self, tiny: ModuleType, warmup: float, first_sparse: int) -> None:
        sparse, dense, kernel_calls = sparse_calls(tiny, tiny.wan_pipeline(), tiny.config(warmup=warmup))
        assert sparse == every(range(first_sparse, STEPS), BOTH, [0, 1, 2])
        assert dense == every(range(first_sparse), BOTH, [0, 1, 2])
        assert kernel_calls == sparse.total()

    @pytest.mark.parametrize(
        ("dense_layers", "sparse_layers"), [((0,), [1, 2]), ((-1,), [0, 1]), ((0, -3, 1), [2]), ((0, 1, 2), [])]
    )
    def test_dense_layers(self, tiny: ModuleType, dense_layers: tuple[int, ...], sparse_layers: list[int]) -> None:
        config = tiny.config(warmup=2, dense_layers=dense_layers)
        sparse, _, kernel_calls = sparse_calls(tiny, tiny.wan_pipeline(), config)
        assert sparse == every(range(2, STEPS), BOTH, sparse_layers)
        assert kernel_calls == sparse.total()

    def test_without_guidance_there_is_one_branch(self, tiny: ModuleType) -> None:
        sparse, _, kernel_calls = sparse_calls(tiny, tiny.wan_pipeline(), tiny.config(warmup=1), guidance_scale=1.0)
        assert sparse == every(range(1, STEPS), ["cond"], [0, 1, 2])
        assert kernel_calls == 9

    def test_two_prompts_share_a_call_but_not_a_mask(self, tiny: ModuleType) -> None:
        pipe = tiny.wan_pipeline()
        enable(pipe, tiny.config(warmup=1))
        with tiny.spy_on_kernel() as masks:
            tiny.generate(pipe, ["a red cup", "hands"], num_inference_steps=STEPS)
        assert len(masks) == 3 * 2 * 3
        assert {mask.kv_num_blocks.shape[:2] for mask in masks} == {(2, 2)}
        assert any(not torch.equal(mask.block_map[0], mask.block_map[1]) for mask in masks)

    def test_image_to_video_reads_the_step_from_the_scheduler(self, tiny: ModuleType) -> None:
        sparse, _, kernel_calls = sparse_calls(tiny, tiny.wan_i2v_pipeline(), tiny.config(warmup=2))
        assert sparse == every(range(2, STEPS), BOTH, [0, 1, 2])
        assert kernel_calls == sparse.total()

    def test_two_transformers_share_the_count_of_steps(self, tiny: ModuleType) -> None:
        pipe = tiny.wan_pipeline(
            tiny.wan_transformer(), tiny.wan_transformer(seed=1, num_layers=2), boundary_ratio=0.88
        )
        sparse, dense, kernel_calls = sparse_calls(tiny, pipe, tiny.config(warmup=1, dense_layers=(-1,)))
        timesteps = pipe.scheduler.timesteps
        switch = int((timesteps >= 880).sum())
        assert 1 < switch < STEPS
        assert sparse == every(range(1, switch), BOTH, [0, 1]) + every(range(switch, STEPS), BOTH, [0], "transformer_2")
        assert (sparse + dense).total() == 2 * (3 * switch + 2 * (STEPS - switch))
        assert kernel_calls == sparse.total()

    def test_cross_attention_is_never_touched(self, tiny: ModuleType) -> None:
        model, inputs = tiny.wan_i2v_transformer(), tiny.wan_i2v_inputs(GRID)
        seen = []
        for block in model.blocks:
            block.attn2.register_forward_pre_hook(lambda module, _: seen.append(module.processor._attention_backend))
        enable(model, tiny.config())
        with tiny.spy_on_kernel() as masks, tiny.spy_on_dense() as dense_calls:
            tiny.run(model, inputs)
        assert seen == [None] * 3
        assert len(masks) == 3
        assert not dense_calls
        assert all(mask.num_key_blocks == mask.num_query_blocks for mask in masks)

    def test_timesteps_per_token_refuse_tiles_of_several_frames(self, tiny: ModuleType) -> None:
        model = tiny.wan_transformer()
        enable(model, tiny.config(tile=(2, 2, 4)))
        tiny.run(model, tiny.wan_inputs(GRID))
        with pytest.raises(
            InputError, match=r"tile is \(2, 2, 4\); .* tiles of one frame, because it has a timestep per"
        ):
            tiny.run(model, tiny.wan_inputs(GRID, per_token_timesteps=True))
        assert model.blocks[0].attn1.processor._attention_backend is None


class TestHunyuan:
    def test_dual_and_single_blocks_count_through(self, tiny: ModuleType) -> None:
        config = tiny.config(warmup=0.5, dense_layers=(0, -1))
        sparse, dense, kernel_calls = sparse_calls(tiny, tiny.hunyuan_pipeline(), config)
        assert sparse == every(range(2, STEPS), ["cond"], [1, 2])
        assert (sparse + dense) == every(range(STEPS), ["cond"], [0, 1, 2, 3])
        assert kernel_calls == sparse.total()

    def test_true_guidance_has_two_branches(self, tiny: ModuleType) -> None:
        sparse, _, kernel_calls = sparse_calls(
            tiny, tiny.hunyuan_pipeline(), tiny.config(warmup=3), negative_prompt="grey", true_cfg_scale=2.0
        )
        assert sparse == every(range(3, STEPS), BOTH, [0, 1, 2, 3])
        assert kernel_calls == sparse.total()

    def test_token_replacement_refuses_tiles_of_several_frames(self, tiny: ModuleType) -> None:
        model = tiny.hunyuan_transformer(image_condition_type="token_replace")
        enable(model, tiny.config(tile=(3, 2, 2)))
        with pytest.raises(InputError, match="its first frame is modulated on its own"):
            tiny.run(model, tiny.hunyuan_inputs(GRID))


class TestStep:
    """Where the step comes from when the pipeline does not announce it."""

    def calls_of(self, tiny: ModuleType, model: nn.Module, **details: Any) -> set[tuple[int | None, str | None, bool]]:
        handle = enable(model, tiny.config(warmup=0.5))
        with model.cache_context("cond", **details):
            tiny.run(model, tiny.wan_inputs(GRID))
        return {(call.step, call.branch, call.sparse) for call in handle.stats().calls}

    @pytest.mark.parametrize(("step", "sparse"), [(0, False), (4, False), (5, True), (9, True)])
    def test_a_transformer_alone_listens_to_cache_context(self, tiny: ModuleType, step: int, sparse: bool) -> None:
        calls = self.calls_of(tiny, tiny.wan_transformer(), step_index=step, num_inference_steps=10)
        assert calls == {(step, "cond", sparse)}

    def test_a_transformer_alone_without_a_step_says_what_to_do(self, tiny: ModuleType) -> None:
        model = tiny.wan_transformer()
        enable(model, tiny.config(warmup=2))
        with pytest.raises(InputError, match=r"warmup is 2, but the denoising step is not known.*set warmup=0"):
            tiny.run(model, tiny.wan_inputs(GRID))
        with pytest.raises(InputError, match="not known"):
            self.calls_of(tiny, model)

    def test_without_warm_up_no_step_is_needed(self, tiny: ModuleType) -> None:
        model = tiny.wan_transformer()
        handle = enable(model, tiny.config(warmup=0))
        tiny.run(model, tiny.wan_inputs(GRID))
        assert [(call.step, call.sparse) for call in handle.stats().calls] == [(None, True)] * 3

    def test_the_announcement_ends_with_the_context_even_after_an_error(self, tiny: ModuleType) -> None:
        model = tiny.wan_transformer()
        enable(model, tiny.config(warmup=2))
        with pytest.raises(ZeroDivisionError), model.cache_context("cond", step_index=5, num_inference_steps=10):
            raise ZeroDivisionError
        with pytest.raises(InputError, match="not known"):
            tiny.run(model, tiny.wan_inputs(GRID))

    @pytest.mark.parametrize("make", ["wan_i2v_pipeline", "hunyuan_pipeline"])
    def test_a_scheduler_with_begin_index_counts_from_it(self, tiny: ModuleType, make: str) -> None:
        pipe = getattr(tiny, make)()
        enable(pipe, tiny.config())
        pipe.scheduler.set_timesteps(10)
        pipe.scheduler.set_begin_index(6)
        pipe._num_timesteps = 4
        handle = enable(pipe, tiny.config(warmup=0.5))
        for expected in (0, 1, 2, 3):
            inputs = tiny.wan_i2v_inputs(GRID) if "wan" in make else tiny.hunyuan_inputs(GRID)
            with pipe.transformer.cache_context("cond"):
                tiny.run(pipe.transformer, inputs)
            assert {call.step for call in handle.stats().calls} == set(range(expected + 1))
            sample = torch.zeros(1, 1)
            pipe.scheduler.step(sample, pipe.scheduler.timesteps[6 + expected], sample)
        assert {call.step for call in handle.stats().calls if call.sparse} == {2, 3}

    def test_a_scheduler_without_step_index_is_asked_for_its_timesteps(self, tiny: ModuleType) -> None:
        pipe = tiny.wan_i2v_pipeline()
        pipe.scheduler = DDIMScheduler()
        assert not hasattr(pipe.scheduler, "step_index")
        pipe.scheduler.set_timesteps(4)
        pipe._num_timesteps = 4
        handle = enable(pipe, tiny.config(warmup=2))
        for timestep in pipe.scheduler.timesteps:
            pipe._current_timestep = timestep
            with pipe.transformer.cache_context("cond"):
                tiny.run(pipe.transformer, tiny.wan_i2v_inputs(GRID))
        calls = handle.stats().calls
        assert [(call.step, call.sparse) for call in calls[::3]] == [(0, False), (1, False), (2, True), (3, True)]
        pipe._current_timestep = None
        with pytest.raises(InputError, match="not known"):
            tiny.run(pipe.transformer, tiny.wan_i2v_inputs(GRID))

    def test_a_second_run_begins_at_step_zero_and_forgets_the_first(self, tiny: ModuleType) -> None:
        pipe = tiny.wan_pipeline()
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        handle = enable(pipe, tiny.config(warmup=1))
        for _ in range(2):
            tiny.generate(pipe, num_inference_steps=2, guidance_scale=1.0)
            assert [(call.step, call.sparse) for call in handle.stats().calls] == [(0, False)] * 3 + [(1, True)] * 3

    def test_every_run_of_a_single_step_is_a_run_of_its_own(self, tiny: ModuleType) -> None:
        pipe = tiny.wan_pipeline()
        handle = enable(pipe, tiny.config())
        for _ in range(2):
            tiny.generate(pipe, num_inference_steps=1)
        assert len(handle.stats().calls) == 6


class TestStats:
    def test_density_and_grouping(self, tiny: ModuleType) -> None:
        pipe = tiny.wan_pipeline()
        handle = enable(pipe, tiny.config(warmup=1, dense_layers=(0,)))
        with tiny.spy_on_kernel() as masks:
            tiny.generate(pipe, num_inference_steps=2, guidance_scale=1.0)
        stats = handle.stats()
        densities = [float(torch.stack([mask.to_dense(0)]).float().mean()) for mask in masks]
        assert stats.num_sparse_calls == 2
        assert stats.density == pytest.approx(sum(densities) / 2, rel=1e-4)
        assert 0.3 < stats.density < 0.7
        assert stats.run_density == pytest.approx((4 + sum(densities)) / 6, rel=1e-4)
        assert {step: group.density < 1 for step, group in stats.by_step().items()} == {0: False, 1: True}
        assert {layer: group.num_sparse_calls for layer, group in stats.by_layer().items()} == {0: 0, 1: 1, 2: 1}
        assert stats.mask_seconds > 0
        assert all((call.mask_seconds > 0) == call.sparse for call in stats.calls)
        handle.reset_stats()
        assert handle.stats().calls == []
        assert (handle.stats().density, handle.stats().run_density) == (1.0, 1.0)

    def test_callbacks_and_progress_bar_still_work(self, tiny: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        pipe = tiny.wan_pipeline()
        enable(pipe, tiny.config())
        seen = []

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
            seen.append((pipeline is pipe, step, len(pipeline.draft.stats().calls), sorted(tensors)))
            return tensors

        pipe.set_progress_bar_config(disable=False)
        tiny.generate(pipe, num_inference_steps=2, guidance_scale=1.0, callback_on_step_end=on_step_end)
        assert seen == [(True, 0, 3, ["latents"]), (True, 1, 6, ["latents"])]
        assert "2/2" in capsys.readouterr().err

    def test_an_interrupted_pipeline_can_run_again(self, tiny: ModuleType) -> None:
        pipe = tiny.wan_pipeline()
        dense = tiny.generate(pipe, num_inference_steps=2)
        enable(pipe, tiny.config())
        draft = tiny.generate(pipe, num_inference_steps=2)

        def interrupt(*_: Any) -> dict:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tiny.generate(pipe, num_inference_steps=2, callback_on_step_end=interrupt)
        assert torch.equal(tiny.generate(pipe, num_inference_steps=2), draft)
        disable(pipe)
        assert torch.equal(tiny.generate(pipe, num_inference_steps=2), dense)
