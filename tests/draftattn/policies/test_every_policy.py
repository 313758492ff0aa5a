"""What holds for every policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from draftattn import BlockMask, DraftConfig, InputError, block_layout, draft_attention
from draftattn.attention import attend
from draftattn.inputs import AttentionInputs
from draftattn.policies import POLICY_NAMES, make_policy, policy_settings, policy_text, read_policy
from draftattn.policy import CallContext, ObservingPolicy

Call = Callable[..., AttentionInputs]
CONTEXT = CallContext(layer=1, step=6, num_steps=10, branch="cond", run=object())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def mask_of(inputs: AttentionInputs, name: str, **settings: Any) -> BlockMask:
    return make_policy(DraftConfig(policy=name, **settings))(inputs, CONTEXT)


@pytest.mark.parametrize("name", POLICY_NAMES)
class TestEveryPolicy:
    @pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
    @pytest.mark.parametrize("tile", [(1, 4, 5), (2, 2, 5)], ids=str)
    def test_no_row_is_empty_and_the_lists_say_what_the_map_says(
        self, call: Call, name: str, sparsity: float, tile: tuple[int, int, int]
    ) -> None:
        inputs = call(tile=tile, batch=2)
        mask = mask_of(inputs, name, sparsity=sparsity)
        assert (mask.kv_num_blocks >= 1).all()
        block_map = mask.block_map
        assert block_map.shape[2:] == (inputs.layout.num_blocks,) * 2
        again = BlockMask(mask.kv_num_blocks, mask.kv_indices, mask.query_offsets, mask.key_offsets, mask.block_size)
        assert torch.equal(again.block_map, block_map)
        used = torch.arange(mask.kv_indices.shape[-1], device=DEVICE) < mask.kv_num_blocks[..., None]
        ascending = mask.kv_indices.diff(dim=-1) > 0
        assert (ascending | ~used[..., 1:]).all()
        assert torch.equal(mask.query_offsets, inputs.layout.offsets)

    def test_text_is_dense_both_ways(self, call: Call, name: str) -> None:
        inputs = call(text=23, batch=2, lengths=[23, 5])
        block_map = mask_of(inputs, name, sparsity=0.9).block_map
        video = inputs.layout.num_video_blocks
        assert video < inputs.layout.num_blocks
        assert block_map[..., video:].all()
        assert block_map[..., video:, :].all()

    def test_padding_text_never_reaches_the_choice(self, call: Call, name: str) -> None:
        inputs = call(text=23, batch=2, lengths=[5, 23])
        clean = mask_of(inputs, name)
        for x in (inputs.query, inputs.key, inputs.value):
            x[0, inputs.layout.grid.num_tokens + 5 :] = torch.nan
        poisoned = AttentionInputs(inputs.query, inputs.key, inputs.value, inputs.layout, inputs.text_lengths)
        assert torch.equal(clean.block_map, mask_of(poisoned, name).block_map)

    @pytest.mark.parametrize("residual", [False, True])
    def test_the_kernel_takes_the_mask(self, call: Call, name: str, residual: bool) -> None:
        inputs = call(text=23, batch=2, lengths=[23, 5])
        config = DraftConfig(policy=name, residual=residual)
        output = attend(inputs, make_policy(config)(inputs, CONTEXT), config)
        assert output.shape == inputs.query.shape
        assert output[:, : inputs.layout.grid.num_tokens].isfinite().all()

    def test_items_of_a_batch_choose_alone(self, call: Call, name: str) -> None:
        if name == "random":
            pytest.skip("draws for a whole batch at once")
        inputs = call(text=23, batch=3, lengths=[23, 4, 11])
        together = mask_of(inputs, name).block_map.expand(3, 4, -1, -1)
        for item in range(3):
            one = slice(item, item + 1)
            tensors = [x[one] for x in (inputs.query, inputs.key, inputs.value)]
            alone = AttentionInputs(*tensors, inputs.layout, inputs.text_lengths[one])  # type: ignore[index]
            assert torch.equal(mask_of(alone, name).block_map.expand(1, 4, -1, -1)[0], together[item])

    def test_grouped_heads_share_the_keys_of_their_group(self, call: Call, name: str) -> None:
        inputs = call(heads=4, kv_heads=2)
        key, value = (x.repeat_interleave(2, dim=2) for x in (inputs.key, inputs.value))
        repeated = AttentionInputs(inputs.query, key, value, inputs.layout)
        # weighted means of a group are made for all its heads together
        assert torch.equal(
            mask_of(inputs, name, weighted_means=False).block_map,
            mask_of(repeated, name, weighted_means=False).block_map,
        )

    def test_equal_runs_choose_equally(self, call: Call, name: str) -> None:
        assert torch.equal(mask_of(call(), name).block_map, mask_of(call(), name).block_map)

    def test_a_call_outside_any_run(self, call: Call, name: str) -> None:
        inputs = call()
        output = draft_attention(
            inputs.query, inputs.key, inputs.value, inputs.layout, DraftConfig(policy=name, sparsity=0.5)
        )
        assert output.isfinite().all()

    def test_its_name_reads_back(self, name: str) -> None:
        assert read_policy(name) == name
        settings = policy_settings(name)
        if settings is not None:
            assert settings.name == name
            assert policy_text(settings) == policy_text(name) == name

    @pytest.mark.gpu
    @pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
    def test_never_waits_for_the_device(self, call: Call, name: str) -> None:
        policy = make_policy(DraftConfig(policy=name, sparsity=0.6))
        inputs = call(text=23, batch=2, lengths=[23, 5])

        def everything() -> None:
            run = object()
            for step in range(4):
                again = AttentionInputs(inputs.query, inputs.key, inputs.value, inputs.layout, inputs.text_lengths)
                context = CallContext(layer=1, step=step, num_steps=4, run=run)
                if step == 0 and isinstance(policy, ObservingPolicy):
                    policy.observe(again, context)
                else:
                    policy(again, context)

        everything()  # compiles kernels and fills caches
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            everything()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["draft", "oracle", "random", "adaspa"])
@pytest.mark.parametrize("sparsity", [0.3, 0.75, 0.9])
def test_budget_policies_keep_the_share_that_sparsity_leaves(call: Call, name: str, sparsity: float) -> None:
    inputs = call(batch=2)
    video = inputs.layout.num_blocks
    kept = mask_of(inputs, name, sparsity=sparsity, growth=0).kv_num_blocks.float().mean((1, 2))
    expected = torch.full_like(kept, float(-(-(video * (1 - sparsity) - 1e-9) // 1)))
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("name", ["svg", "radial", "sliding_tile"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_patterns_fill_the_budget_and_do_not_exceed_it(call: Call, name: str, sparsity: float) -> None:
    inputs = call()
    density = mask_of(inputs, name, sparsity=sparsity).block_map.float().mean()
    blocks = inputs.layout.num_blocks
    budget = -(-(blocks * (1 - sparsity) - 1e-9) // 1) / blocks
    assert 0.75 * budget <= density <= budget + 1e-6


class TestReading:
    def test_settings_after_the_name(self) -> None:
        policy: Any = read_policy("sliding_tile:window=3x1x2:queries=8")
        assert (policy.window, policy.queries) == ((3, 1, 2), 8)
        assert policy_text(policy) == "sliding_tile:window=3x1x2:queries=8"
        carve: Any = read_policy("carve:neighbours=no")
        assert carve.neighbours is False
        assert policy_text(carve) == "carve:neighbours=no"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("svgg", "policy is 'svgg'; choose from draft, svg"),
            ("xattention:tau=0.9", "'xattention' takes mass=…, stride=…"),
            ("xattention:mass", "'xattention' takes"),
            ("xattention:mass=much", "'much' is no number"),
            ("xattention:mass=1.5", r"mass of policy 'xattention' is 1.5; it must be in \(0, 1\]"),
            ("draft:x=1", "'draft' has no settings of its own"),
            ("oracle:x=1", "'oracle' has no settings of its own"),
            ("sliding_tile:window=0x1x1", "three positive integers"),
            ("radial:decay=-1", "decay"),
            ("adaspa:search_every=0", "search_every"),
            ("sparge:similarity=2", "similarity"),
            ("svg:queries=0", "queries"),
            ("random:seed=0.5", "seed"),
        ],
    )
    def test_what_cannot_be_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_policy(text)

    def test_a_config_refuses_an_unknown_policy(self) -> None:
        with pytest.raises(InputError, match="policy is 'svgg'"):
            DraftConfig(policy="svgg")
        with pytest.raises(InputError, match="policy is 3"):
            DraftConfig(policy=3)  # type: ignore[arg-type]


def test_another_layout_of_the_same_shape_does_not_share_memory(call: Call) -> None:
    """Policies remember by layout: two grids of as many blocks must not be confused."""
    policy = make_policy(DraftConfig(policy="adaspa", sparsity=0.6))
    inputs = call()
    first = policy(inputs, CONTEXT).block_map
    other = block_layout(inputs.layout.grid, (1, 5, 4), block_size=20, device=DEVICE)
    second = policy(AttentionInputs(inputs.query, inputs.key, inputs.value, other), CONTEXT)
    assert second.query_offsets is other.offsets
    assert not torch.equal(first, second.block_map)
