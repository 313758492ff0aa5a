"""Options of a wrong type are refused by name before anything is computed, and harm no later call."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from draftattn.errors import InputError
from draftattn.pipelines.llm import SystemConfig, apply
from draftattn.pipelines.llm.apply import SYSTEMS, make_system, system_class
from draftattn.pipelines.llm.inputs import even_offsets

if TYPE_CHECKING:
    from fractions import Fraction


@pytest.mark.parametrize(
    ("system", "option", "value", "words"),
    [
        ("draft", "density", "half", r"density is 'half'; it must be a number$"),
        ("draft", "density", True, r"density is True; it must be a number$"),
        ("draft", "density", float("nan"), r"density is nan; it must be a number$"),
        ("draft", "density", None, r"density is None; it must be a number$"),
        ("draft", "block_size", 64.0, r"block_size is 64\.0; it must be a whole number$"),
        ("draft", "block_size", "64", r"block_size is '64'; it must be a whole number$"),
        ("draft", "block_size", True, r"block_size is True; it must be a whole number$"),
        ("draft", "residual", "no", r"residual is 'no'; it must be true or false$"),
        ("draft", "residual", 1, r"residual is 1; it must be true or false$"),
        ("draft", "budget", "head", r"budget is 'head'; choose layer or row$"),
        ("draft", "budget", ["row"], r"budget is \['row'\]; choose layer or row$"),
        ("draft", "dense_layers", 0, r"dense_layers is 0; it must be a list of whole numbers$"),
        ("draft", "dense_layers", "01", r"dense_layers is '01'; it must be a list of whole numbers$"),
        ("draft", "dense_layers", [0.5], r"dense_layers is \[0\.5\]; it must be a list of whole numbers$"),
        ("moba", "dense_len", "long", r"dense_len is 'long'; it must be a whole number$"),
        ("moba", "force_first", "no", r"force_first is 'no'; it must be true or false$"),
        ("streaming", "window", 8.0, r"window is 8\.0; it must be a whole number$"),
        ("streaming", "dense_layers", [0, -1], r"^dense_layers is \(0, -1\); streaming serves all layers"),
        ("streaming", "dense_len", 8, r"^dense_len is 8; streaming serves all layers"),
        ("nsa", "gate_init", 3.0, r"gate_init is 3\.0; it must be a list of numbers$"),
        ("nsa", "compression", "max", r"compression is 'max'; choose linear or mean$"),
        ("nsa", "weights", 3, r"weights is 3; it must be text, or None$"),
        ("seer", "gates", None, r"gates is None; it must be text$"),
        ("seer", "threshold", "low", r"threshold is 'low'; it must be a number, or None$"),
        ("selective", "budget", 9.0, r"budget is 9\.0; it must be a whole number, or a list of whole numbers or None"),
        ("selective", "budget", [9, "x"], r"budget is \[9, 'x'\]; it must be a whole number, or a list"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(system: str, option: str, value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_system(system, **{option: value})


def test_every_system_checks_all_its_options() -> None:
    for name in SYSTEMS:
        kind = system_class(name).config_class
        for option in kind.__dataclass_fields__:
            with pytest.raises(InputError, match=rf"^{option} is <object.*; (it must be|choose) "):
                kind(**{option: object()})


def test_values_that_mean_the_same_are_taken() -> None:
    config = make_system(
        "draft", density=np.float32(0.5), block_size=np.int64(64), dense_layers=[np.int32(0), -1]
    ).config
    assert (config.density, config.block_size, config.dense_layers) == (0.5, 64, (0, -1))
    assert {type(x) for x in (config.block_size, *config.dense_layers)} == {int}
    assert type(config.density) is float
    assert make_system("draft", density=1, dense_layers=range(2)).config.dense_layers == (0, 1)
    assert make_system("selective", budget=[4, None]).config.budget == (4, None)
    assert make_system("nsa", gate_init=[1, 2, 3]).config.gate_init == (1.0, 2.0, 3.0)
    assert make_system("nsa", weights=pathlib.Path("a", "b")).config.weights == str(pathlib.Path("a", "b"))


def test_types_of_a_system_of_ones_own_are_left_to_it() -> None:
    @dataclass(frozen=True)
    class Own(SystemConfig):
        rule: Any = None
        like: torch.Tensor | None = None

    @dataclass(frozen=True)
    class Unresolved(SystemConfig):
        share: Fraction | None = None

    assert Own(rule="any", like=None).rule == "any"
    assert Unresolved(share=0.5).share == 0.5  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dense_len is 'x'"):
        Unresolved(dense_len="x")  # type: ignore[arg-type]


@torch.no_grad()
def test_a_mistyped_option_breaks_no_later_call(lm: SimpleNamespace) -> None:
    model, ids = lm.model(), lm.ids(77)
    with pytest.raises(InputError, match="block_size"):
        apply(model, "draft", block_size=32.0, dense_len=0)
    apply(model, "draft", block_size=32, dense_len=0)
    assert model(ids).logits.isfinite().all()
    # what needs no configuration is kept apart by type
    even_offsets(1237, 32.0, "cpu")  # type: ignore[arg-type]
    assert even_offsets(1237, 32, "cpu").dtype == torch.int32
