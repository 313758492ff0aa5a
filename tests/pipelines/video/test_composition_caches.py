"""The caches of diffusers skip work from step to step, and with draft attention they skip the same work."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from draftattn import disable, enable

STEPS = 6


def first_block(pipe: Any) -> FirstBlockCacheConfig:
    del pipe
    return FirstBlockCacheConfig(threshold=0.8)


def mag(pipe: Any) -> MagCacheConfig:
    del pipe
    return MagCacheConfig(
        threshold=0.5, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    )


def faster(pipe: Any) -> FasterCacheConfig:
    return FasterCacheConfig(
        spatial_attention_block_identifiers=("^blocks.*attn1", "^transformer_blocks.*attn", "^single_.*attn"),
        spatial_attention_timestep_skip_range=(-1, 901),
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe._current_timestep,
    )


def taylor_seer(pipe: Any) -> TaylorSeerCacheConfig:
    del pipe
    return TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn1", r".*transformer_blocks\.\d+\.attn"],
    )


def pyramid(pipe: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks", "single_transformer_blocks"),
        current_timestep_callback=lambda: pipe._current_timestep,
    )


@pytest.mark.parametrize("cache", [first_block, mag, faster, taylor_seer, pyramid], ids=lambda cache: cache.__name__)
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_cache(tiny: ModuleType, family: str, cache: Callable[[Any], Any]) -> None:
    pipe = getattr(tiny, f"{family}_pipeline")()
    uncached = tiny.generate(pipe, num_inference_steps=STEPS, guidance_scale=1.0)
    pipe.transformer.enable_cache(cache(pipe))
    dense = tiny.generate(pipe, num_inference_steps=STEPS, guidance_scale=1.0)
    assert not torch.equal(dense, uncached), "the cache was never used"
    handle = enable(pipe, tiny.config(sparsity=0, warmup=1))
    draft = tiny.generate(pipe, num_inference_steps=STEPS, guidance_scale=1.0)
    torch.testing.assert_close(draft, dense, rtol=1e-3, atol=2e-4)
    calls = handle.stats().calls
    assert sum(call.sparse for call in calls) > 0
    assert len(calls) < STEPS * (3 if family == "wan" else 4)
    # off and on again while the cache stays
    disable(pipe)
    assert torch.equal(tiny.generate(pipe, num_inference_steps=STEPS, guidance_scale=1.0), dense)
    pipe.transformer.disable_cache()
    enable(pipe, tiny.config(sparsity=0, warmup=1))
    draft = tiny.generate(pipe, num_inference_steps=STEPS, guidance_scale=1.0)
    torch.testing.assert_close(draft, uncached, rtol=1e-3, atol=2e-4)
