"""Settings: what is allowed, and what a user reads when it is not."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from draftattn import DraftConfig, InputError
from draftattn.policies import POLICY_NAMES, policy_settings
from draftattn.schedule import SparsitySchedule

BAD_VALUES: list[tuple[str, Any, str]] = [
    *[("sparsity", value, r"\[0, 1\)") for value in (-0.1, 1, 1.0, 2, math.nan, math.inf, "0.5", None, True, False)],
    *[
        ("warmup", value, "share of the steps")
        for value in (-1, -0.1, 1.01, 2.5, math.nan, math.inf, "3", None, True, False)
    ],
    *[("selection", value, "row, head") for value in ("rows", "", None, 1, ["row"])],
    *[("block_size", value, "16 to 128") for value in (0, 15, 129, 64.0, "64", None, True)],
    *[("backend", value, "auto, reference, cpu, triton") for value in ("cuda", "", None, 3)],
    *[
        ("tile", value, "three positive integers")
        for value in ((8, 16), (1, 0, 8), (1, 2.0, 8), (True, 8, 8), 8, "1x8x8")
    ],
    *[("dense_layers", value, "layer numbers") for value in ((1.0,), ("0",), (None,), (True,), 3, "01")],
]


@pytest.mark.parametrize(
    ("field", "value", "allowed"), BAD_VALUES, ids=[f"{field}={value!r}" for field, value, _ in BAD_VALUES]
)
def test_a_bad_value_is_named_with_what_is_allowed_in_one_line(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InputError, match=allowed) as caught:
        DraftConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(field)
    assert repr(value).strip("()[]") in message
    assert "\n" not in message


def test_a_tile_larger_than_the_block_is_named() -> None:
    with pytest.raises(InputError, match="tile 1×8×16 holds 128 tokens; a block holds at most 64"):
        DraftConfig(tile=(1, 8, 16), block_size=64)


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0},
        {"sparsity": 0.999},
        {"warmup": 0},
        {"warmup": 0.0},
        {"warmup": 1.0},
        {"warmup": 1000},
        {"tile": (2, 8, 8)},
        {"block_size": 16},
        {"dense_layers": (-1, 0)},
    ],
    ids=str,
)
def test_allowed_values_pass(settings: dict[str, Any]) -> None:
    config = DraftConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_lists_become_tuples_so_that_a_config_can_be_hashed() -> None:
    config = DraftConfig(tile=[1, 8, 8], dense_layers=[0, -1])  # type: ignore[arg-type]
    assert (config.tile, config.dense_layers) == ((1, 8, 8), (0, -1))
    assert hash(config) == hash(DraftConfig(tile=(1, 8, 8), dense_layers=(0, -1)))


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_schedule_goes_with_every_policy_whose_density_is_set(name: str) -> None:
    schedule = SparsitySchedule((0.5, 1.0), (0.5, 0.9))
    if name in ("xattention", "sparge"):
        for policy in (name, policy_settings(name)):
            with pytest.raises(InputError, match=f"{name}.* with a schedule; its density follows from its mass"):
                DraftConfig(policy=policy, schedule=schedule)  # type: ignore[arg-type]
    else:
        assert DraftConfig(policy=name, schedule=schedule).sparsity_at(0, 6, 10) == 0.9


def test_a_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        DraftConfig().sparsity = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("warmup", "num_steps", "expected"),
    [
        (0, 50, 0),
        (0.0, 50, 0),
        (0.25, 50, 13),
        (0.25, 4, 1),
        (0.25, 1, 1),
        (0.1, 30, 3),  # 0.1 * 30 is 3.0000000000000004 in floats
        (0.3, 10, 3),
        (0.01, 50, 1),
        (1.0, 50, 50),
        (1, 50, 1),
        (7, 50, 7),
        (50, 50, 50),
        (99, 50, 50),
    ],
)
def test_warmup_steps_round_up_and_never_exceed_the_run(warmup: float, num_steps: int, expected: int) -> None:
    assert DraftConfig(warmup=warmup).num_warmup_steps(num_steps) == expected
