"""Named settings."""

from __future__ import annotations

from typing import Any

import pytest

from draftattn import DraftConfig, InputError, preset
from draftattn.presets import PRESETS, resolve_config


@pytest.mark.parametrize(
    ("name", "sparsity", "dense_layers"),
    [
        ("published-wan-55", 0.55, (0,)),
        ("published-wan-75", 0.75, (0,)),
        ("published-hunyuan-60", 0.6, (0, 1)),
        ("published-hunyuan-80", 0.8, (0, 1)),
        ("published-hunyuan-90", 0.9, (0, 1)),
    ],
)
def test_published_presets_carry_the_settings_of_the_paper(
    name: str, sparsity: float, dense_layers: tuple[int, ...]
) -> None:
    assert preset(name) == DraftConfig(
        sparsity=sparsity,
        warmup=0.25,
        growth=0.0,
        selection="head",
        residual=False,
        tile=(1, 8, 16),
        block_size=128,
        dense_layers=dense_layers,
    )


@pytest.mark.parametrize(("name", "sparsity"), [("quality", 0.5), ("balanced", 0.75), ("fast", 0.9)])
def test_our_presets_are_the_defaults_at_their_sparsity(name: str, sparsity: float) -> None:
    assert preset(name) == DraftConfig(sparsity=sparsity)


def test_no_preset_is_untested() -> None:
    assert set(PRESETS) == {
        "quality",
        "balanced",
        "fast",
        "published-wan-55",
        "published-wan-75",
        "published-hunyuan-60",
        "published-hunyuan-80",
        "published-hunyuan-90",
    }


def test_changes_apply_to_a_copy() -> None:
    assert preset("fast", warmup=0, dense_layers=(3,)) == DraftConfig(sparsity=0.9, warmup=0, dense_layers=(3,))
    assert preset("fast").warmup == DraftConfig().warmup


def test_a_change_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"sparsity is 1\.5"):
        preset("fast", sparsity=1.5)


def test_an_unknown_name_is_answered_with_all_names() -> None:
    with pytest.raises(InputError, match="preset is 'turbo'") as caught:
        preset("turbo")
    assert all(name in str(caught.value) for name in PRESETS)


def test_resolve_takes_a_config_a_name_or_nothing() -> None:
    config = DraftConfig(sparsity=0.3)
    assert resolve_config(config) is config
    assert resolve_config("fast") == preset("fast")
    assert resolve_config(None) == DraftConfig()


@pytest.mark.parametrize("draft", [0.75, {"sparsity": 0.5}, DraftConfig], ids=str)
def test_resolve_refuses_anything_else(draft: Any) -> None:
    with pytest.raises(InputError, match="must be a DraftConfig or a preset"):
        resolve_config(draft)
