from typing import Any

import pytest
import torch

from draftattn import DraftConfig
from draftattn.eval import architectures
from draftattn.eval.bench_model import bench_model
from draftattn.pipelines.video.wan import WanAdapter


@pytest.fixture
def small_architecture(monkeypatch: pytest.MonkeyPatch) -> str:
    config = {**architectures._WAN, "num_attention_heads": 2, "num_layers": 4, "ffn_dim": 64, "text_dim": 16}
    monkeypatch.setitem(architectures.ARCHITECTURES, "small", ("WanTransformer3DModel", config))
    return "small"


def bench(model: str, dtype: torch.dtype) -> dict[str, Any]:
    config = DraftConfig(sparsity=0.75, warmup=0, tile=(1, 4, 4))
    size = {"height": 128, "width": 192, "num_frames": 9}
    return bench_model(model, **size, config=config, repeats=1, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_figures_name_what_was_measured(small_architecture: str, dtype: torch.dtype) -> None:
    result = bench(small_architecture, dtype)
    assert result["tokens"] == 3 * 8 * 12
    assert result["kernel"] == "cpu"
    assert 0.2 < result["draft"]["density"] < 0.3
    assert result["gate"]["relative_error"] <= result["gate"]["allowed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_is_timed_where_the_rotary_table_keeps_its_order(
    small_architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = tuple(site for site in WanAdapter.token_sites if site.name != "rope")
    monkeypatch.setattr(WanAdapter, "token_sites", sites)
    with pytest.raises(RuntimeError, match="sparsity 0 differs from dense"):
        bench(small_architecture, dtype)
