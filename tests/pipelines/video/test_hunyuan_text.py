"""HunyuanVideo's text padding is dropped, not masked, and nobody notices."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftattn import TokenGrid, enable
from draftattn.pipelines.video.hunyuan_video import HunyuanVideoAdapter

GRID = TokenGrid(3, 5, 7)
VIDEO = GRID.num_tokens


def captured_inputs(model: nn.Module, name: str) -> list[dict[str, Any]]:
    """Collects the positional arguments and outputs of a submodule as it runs."""
    seen: list[dict[str, Any]] = []
    getattr(model, name).register_forward_hook(lambda _, args, output: seen.append({"args": args, "output": output}))
    return seen


class TestDense:
    @pytest.mark.parametrize("lengths", [(7,), (20,), (7, 7), (20, 20)], ids=str)
    def test_equal_prompts_run_without_a_mask_on_their_own_tokens_alone(
        self, tiny: ModuleType, lengths: tuple[int, ...]
    ) -> None:
        model = tiny.hunyuan_transformer()
        enable(model, tiny.config(dense_layers=range(4)))
        with tiny.spy_on_dense() as calls:
            tiny.run(model, tiny.hunyuan_inputs(GRID, lengths))
        assert len(calls) == 4
        assert {shape[1] for shape, _ in calls} == {VIDEO + lengths[0]}
        assert all(mask is None for _, mask in calls)

    def test_unequal_prompts_are_cut_to_the_longest_and_masked(self, tiny: ModuleType) -> None:
        model = tiny.hunyuan_transformer()
        enable(model, tiny.config(dense_layers=range(4)))
        with tiny.spy_on_dense() as calls:
            tiny.run(model, tiny.hunyuan_inputs(GRID, (3, 12)))
        for shape, mask in calls:
            assert shape[1] == VIDEO + 12
            assert mask is not None
            assert mask.flatten(1).sum(1).tolist() == [VIDEO + 3, VIDEO + 12]


class TestSparse:
    @pytest.mark.parametrize("lengths", [(7,), (3, 12), (0, 4), (20, 1, 9)], ids=str)
    def test_keys_end_with_each_prompt(self, tiny: ModuleType, lengths: tuple[int, ...]) -> None:
        model = tiny.hunyuan_transformer()
        enable(model, tiny.config())
        with tiny.spy_on_kernel() as masks:
            tiny.run(model, tiny.hunyuan_inputs(GRID, lengths))
        assert len(masks) == 4
        for mask in masks:
            ends = torch.atleast_2d(mask.key_offsets)[:, -1].expand(len(lengths))
            assert ends.tolist() == [VIDEO + length for length in lengths]
            assert mask.query_offsets[-1] == VIDEO + max(lengths)

    @pytest.mark.parametrize("lengths", [(7,), (3, 12)], ids=str)
    def test_what_stands_in_the_padding_makes_no_difference(self, tiny: ModuleType, lengths: tuple[int, ...]) -> None:
        model, inputs = tiny.hunyuan_transformer(), tiny.hunyuan_inputs(GRID, lengths)
        enable(model, tiny.config())
        expected = tiny.run(model, inputs)
        padding = inputs["encoder_attention_mask"][..., None] == 0
        changed = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].masked_fill(padding, 100.0)}
        torch.testing.assert_close(tiny.run(model, changed), expected, rtol=1e-5, atol=1e-6)

    def test_an_item_does_not_depend_on_the_others_in_its_batch(self, tiny: ModuleType) -> None:
        model, inputs = tiny.hunyuan_transformer(), tiny.hunyuan_inputs(GRID, (3, 12))
        enable(model, tiny.config())
        together = tiny.run(model, inputs)
        for item in range(2):
            alone = {k: v[item : item + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            torch.testing.assert_close(tiny.run(model, alone), together[item : item + 1], rtol=1e-4, atol=2e-5)


def test_refined_text_and_conditioning_are_unchanged(tiny: ModuleType) -> None:
    model, inputs = tiny.hunyuan_transformer(), tiny.hunyuan_inputs(GRID, (3, 12))
    refined, condition = captured_inputs(model, "context_embedder"), captured_inputs(model, "time_text_embed")
    tiny.run(model, inputs)
    enable(model, tiny.config())
    tiny.run(model, inputs)
    full, cut = (call["output"] for call in refined)
    assert (full.shape[1], cut.shape[1]) == (20, 12)
    for item, length in enumerate((3, 12)):
        torch.testing.assert_close(cut[item, :length], full[item, :length])
    assert torch.equal(condition[0]["output"][0], condition[1]["output"][0])


def test_the_callers_arguments_are_left_alone(tiny: ModuleType) -> None:
    model, inputs = tiny.hunyuan_transformer(), tiny.hunyuan_inputs(GRID, (3, 12))
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    enable(model, tiny.config())
    tiny.run(model, inputs)
    for name, value in before.items():
        assert torch.equal(inputs[name], value) if isinstance(value, Tensor) else inputs[name] == value


class TestPrepareText:
    def prepare(self, mask: Tensor) -> tuple[Any, dict[str, Any]]:
        arguments = {"encoder_attention_mask": mask, "encoder_hidden_states": torch.zeros(*mask.shape, 4)}
        return HunyuanVideoAdapter().prepare_text(arguments), arguments

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_long_prompts_are_counted_exactly_in_every_dtype(self, dtype: torch.dtype) -> None:
        # bfloat16 has no 301
        lengths = torch.tensor([301, 257])
        mask = (torch.arange(512) < lengths[:, None]).to(dtype)
        text, arguments = self.prepare(mask)
        assert text.lengths.tolist() == [301, 257]
        assert arguments["encoder_hidden_states"].shape[1] == 301
        assert arguments["encoder_attention_mask"].shape == (2, 301)

    def test_a_mask_with_holes_is_not_cut(self) -> None:
        text, arguments = self.prepare(torch.tensor([[1, 0, 1, 0]]))
        assert arguments["encoder_hidden_states"].shape[1] == 4
        # the model itself attends to the leading `mask.sum()` tokens
        assert text.lengths.tolist() == [2]
        assert not text.mask_is_full

    def test_a_full_mask_is_told_to_be_full(self) -> None:
        text, arguments = self.prepare(torch.ones(2, 4))
        assert (text.lengths, text.mask_is_full) == (None, True)
        assert arguments["encoder_hidden_states"].shape[1] == 4

    def test_an_empty_prompt_keeps_one_token_for_the_refiner(self) -> None:
        text, arguments = self.prepare(torch.zeros(1, 4))
        assert arguments["encoder_hidden_states"].shape[1] == 1
        assert text.lengths.tolist() == [0]

    def test_masks_are_told_apart_by_identity_and_read_once(self) -> None:
        adapter = HunyuanVideoAdapter()
        masks = [(torch.arange(8) < length)[None].float() for length in (3, 5)]
        for _ in range(3):
            for mask, length in zip(masks, (3, 5), strict=True):
                arguments = {"encoder_attention_mask": mask, "encoder_hidden_states": torch.zeros(1, 8, 4)}
                adapter.prepare_text(arguments)
                assert arguments["encoder_hidden_states"].shape[1] == length
        assert len(adapter._seen) == 2
