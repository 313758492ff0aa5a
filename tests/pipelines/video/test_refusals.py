"""What cannot work is refused, and what looks stale is not."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import ParallelConfig, TensorParallelConfig
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from draftattn import BlockMask, InputError, TokenGrid, disable, enable
from draftattn.inputs import AttentionInputs
from draftattn.policy import CallContext

GRID = TokenGrid(3, 5, 7)


def test_gradient_checkpointing(tiny: ModuleType) -> None:
    model = tiny.wan_transformer()
    model.enable_gradient_checkpointing()
    enable(model, tiny.config())
    with pytest.raises(InputError, match="gradient checkpointing"):
        model(**tiny.wan_inputs(GRID))
    tiny.run(model, tiny.wan_inputs(GRID))  # without gradients nothing is run twice


def test_tensor_parallelism(tiny: ModuleType) -> None:
    model = tiny.wan_transformer()
    enable(model, tiny.config())
    model._parallel_config = ParallelConfig(tensor_parallel_config=TensorParallelConfig(tp_degree=2))
    with pytest.raises(InputError, match="transformer has tensor parallelism on"):
        tiny.run(model, tiny.wan_inputs(GRID))
    model._parallel_config = None
    tiny.run(model, tiny.wan_inputs(GRID))


def test_a_processor_that_hands_on_no_parallel_config(tiny: ModuleType) -> None:
    class Processor(WanAttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self._parallel_config = None
            return super().__call__(*args, **kwargs)

    model = tiny.wan_transformer()
    model.blocks[1].attn1.set_processor(Processor())
    enable(model, tiny.config())
    with pytest.raises(InputError, match="did not hand on its _parallel_config"):
        tiny.run(model, tiny.wan_inputs(GRID))


def test_an_attention_mask_where_the_model_has_none(tiny: ModuleType) -> None:
    class Processor(WanAttnProcessor):
        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            mask = torch.ones(1, 1, 1, hidden_states.shape[1], dtype=torch.bool)
            return super().__call__(attn, hidden_states, None, mask, args[-1])

    model = tiny.wan_transformer()
    model.blocks[1].attn1.set_processor(Processor())
    enable(model, tiny.config())
    with pytest.raises(InputError, match="draft attention would drop it"):
        tiny.run(model, tiny.wan_inputs(GRID))


def test_a_text_mask_refilled_in_place_is_read_again(tiny: ModuleType) -> None:
    model = tiny.hunyuan_transformer()
    inputs = tiny.hunyuan_inputs(GRID, lengths=(4,))
    enable(model, tiny.config(sparsity=0.0))
    tiny.run(model, inputs)
    inputs["encoder_attention_mask"][:, :12] = 1
    refilled = tiny.run(model, inputs)
    disable(model)
    torch.testing.assert_close(refilled, tiny.run(model, inputs), atol=1e-5, rtol=1e-5)


def test_own_policy(tiny: ModuleType) -> None:
    class OwnBlockOnly:
        def __call__(self, inputs: AttentionInputs, context: CallContext, scale: float | None = None) -> BlockMask:
            diagonal = torch.eye(inputs.layout.num_blocks, dtype=torch.bool)[None, None]
            return BlockMask.from_block_map(diagonal, inputs.layout.offsets, inputs.key_offsets)

    model = tiny.wan_transformer()
    enable(model, tiny.config(), policy=OwnBlockOnly())
    with tiny.spy_on_kernel() as masks:
        tiny.run(model, tiny.wan_inputs(GRID))
    assert len(masks) == 3
    assert all((mask.kv_num_blocks == 1).all() for mask in masks)


def test_disabling_a_pipeline_reaches_a_transformer_it_no_longer_has(tiny: ModuleType) -> None:
    pipe = tiny.wan_pipeline()
    replaced = pipe.transformer
    before = tiny.footprint(replaced)
    enable(pipe, tiny.config())
    pipe.transformer = tiny.wan_transformer(seed=1)
    disable(pipe)
    assert tiny.footprint(replaced) == before


def test_a_new_run_is_known_by_its_timesteps_where_no_branch_is(tiny: ModuleType) -> None:
    pipe = tiny.hunyuan_pipeline()
    handle = enable(pipe, tiny.config(warmup=0))
    handle._sessions[0]._clock.remove()  # as in pipelines that never announce a branch
    for _ in range(2):
        tiny.generate(pipe, num_inference_steps=1)
    assert {call.branch for call in handle.stats().calls} == {None}
    assert len(handle.stats().calls) == 4
