"""Under ``torch.autocast``, as with torch's own attention, queries, keys and values are rounded and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from draftattn.pipelines.llm import apply

SYSTEMS: dict[str, dict[str, Any]] = {
    "draft": {"dense_len": 0, "block_size": 16},
    "xattention": {"dense_len": 0, "block_size": 16, "stride": 4},
    "minference": {"dense_len": 0, "block_size": 16, "vertical_size": 32, "slash_size": 32},
    "flexprefill": {"dense_len": 0, "block_size": 16, "min_budget": 16},
    "moba": {"chunk_size": 16, "top_k": 3},
    "streaming": {"sink": 4, "window": 20},
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_attention_gets_rounded_inputs_and_computes_as_ever(
    name: str, lm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = lm.model(), torch.device(lm.device).type
    served = []

    def checked(module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        assert not torch.is_autocast_enabled(device)
        served.append(module)
        return forward(module, query, key, value, *others)

    with apply(model, name, **SYSTEMS[name]) as handle:
        forward = handle.system.forward
        monkeypatch.setattr(handle.system, "forward", checked)
        with torch.autocast(device, torch.bfloat16):
            logits = model(lm.ids(120), use_cache=False).logits
    assert len(served) == len(model.model.layers)
    logits.float().square().mean().backward()
    assert all(layer.self_attn.k_proj.weight.grad.isfinite().all() for layer in model.model.layers)
