"""Every policy makes a video with the small trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from draftattn import DraftConfig, enable
from draftattn.policies import POLICY_NAMES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY_WAN = Path(__file__).parents[3] / "assets" / "tiny-wan"
STEPS = 3


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = DiffusionPipeline.from_pretrained(TINY_WAN, use_safetensors=True).to(DEVICE)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def latents(pipe: Any) -> torch.Tensor:
    return pipe(
        "hands moving red cups on a white table",
        height=80,
        width=112,
        num_frames=9,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


@pytest.fixture(scope="module")
def dense(pipe: Any) -> torch.Tensor:
    return latents(pipe)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_run_with_every_policy(pipe: Any, dense: torch.Tensor, name: str) -> None:
    # 3×5×7 tokens in ragged blocks of at most 8
    config = DraftConfig(sparsity=0.6, warmup=1, tile=(1, 2, 4), policy=name)
    with enable(pipe, config) as handle:
        made = latents(pipe)
        stats = handle.stats()
    assert made.isfinite().all()
    assert not torch.equal(made, dense)
    assert stats.num_sparse_calls == len(pipe.transformer.blocks) * (STEPS - 1)
    assert 0.1 < stats.density < 1.0
    # dense but for what the residual cannot give back
    assert (made - dense).norm() < 0.7 * dense.norm()
