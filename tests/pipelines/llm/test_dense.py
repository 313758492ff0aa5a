"""Dense decoding steps: what they compute, and with which of torch's kernels."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from draftattn.pipelines.llm import apply
from draftattn.pipelines.llm.dense import dense_attention, single_query_attention, without_cudnn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SWITCHES = torch.backends.cuda


@pytest.fixture(autouse=True)
def _cudnn_is_on() -> Iterator[None]:
    before = SWITCHES.cudnn_sdp_enabled()
    SWITCHES.enable_cudnn_sdp(True)
    yield
    SWITCHES.enable_cudnn_sdp(before)


def literal(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The definition, in the dtype of its inputs."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(("num_keys", "value_dim"), [(1, 32), (37, 32), (1001, 32), (37, 16)])
def test_single_query_attention(
    num_keys: int, value_dim: int, heads: int, kv_heads: int, masked: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(num_keys)
    query = torch.randn(3, heads, 1, 32, device=DEVICE, dtype=dtype)
    key, value = torch.randn(2, 3, kv_heads, num_keys, 32, device=DEVICE, dtype=dtype)
    value = value[..., :value_dim]
    mask = None
    if masked:
        mask = torch.rand(3, 1, 1, num_keys, device=DEVICE) < 0.5
        mask[..., -1] = True
    output = single_query_attention(query, key, value, 0.3, mask)
    assert output.dtype == dtype
    assert output.shape == (3, 1, heads, value_dim)
    exact = literal(query.double(), key.double(), value.double(), 0.3, mask)
    error, torchs = (
        (x.double() - exact).norm() / exact.norm() for x in (output, literal(query, key, value, 0.3, mask))
    )
    assert error <= 2 * torchs + (1e-6 if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_no_items(masked: bool) -> None:
    query, key = torch.empty(0, 4, 1, 16, device=DEVICE), torch.empty(0, 2, 5, 16, device=DEVICE)
    mask = torch.empty(0, 1, 1, 5, dtype=torch.bool, device=DEVICE) if masked else None
    assert single_query_attention(query, key, key, 1.0, mask).shape == (0, 1, 4, 16)


def test_other_kernels_serve_in_place_of_cudnn() -> None:
    with without_cudnn():
        assert not SWITCHES.cudnn_sdp_enabled()
        with without_cudnn():
            assert not SWITCHES.cudnn_sdp_enabled()
        assert not SWITCHES.cudnn_sdp_enabled()
    assert SWITCHES.cudnn_sdp_enabled()
    with pytest.raises(RuntimeError, match="inside"), without_cudnn():
        raise RuntimeError("inside")
    assert SWITCHES.cudnn_sdp_enabled()


@pytest.mark.parametrize("chosen", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_the_callers_choice_of_one_kernel_stands(chosen: SDPBackend) -> None:
    with sdpa_kernel(chosen):
        before = SWITCHES.cudnn_sdp_enabled(), SWITCHES.flash_sdp_enabled(), SWITCHES.math_sdp_enabled()
        with without_cudnn():
            assert (SWITCHES.cudnn_sdp_enabled(), SWITCHES.flash_sdp_enabled(), SWITCHES.math_sdp_enabled()) == before
        assert SWITCHES.cudnn_sdp_enabled() == before[0]


def test_threads_leave_the_switch_as_it_was() -> None:
    interval = sys.getswitchinterval()

    def use() -> None:
        for _ in range(2000):
            with without_cudnn():
                pass

    threads = [threading.Thread(target=use) for _ in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert SWITCHES.cudnn_sdp_enabled()


def test_a_step_compiles_whole() -> None:
    query, key = torch.randn(1, 1, 4, 16, device=DEVICE), torch.randn(1, 9, 2, 16, device=DEVICE)
    compiled = torch.compile(dense_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(query, key, key, 0.3), dense_attention(query, key, key, 0.3))


@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
@pytest.mark.parametrize(("system", "options"), [("draft", {}), ("streaming", {"sink": 2, "window": 6})])
def test_no_step_of_a_model_asks_cudnn(
    lm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, system: str, options: dict[str, Any], padded: bool
) -> None:
    model = lm.model()
    stock, seen = functional.scaled_dot_product_attention, []

    def spy(query: Tensor, *arguments: Any, **others: Any) -> Tensor:
        mask = others.get("attn_mask")
        if query.shape[2] == 1 or mask is not None:
            seen.append(SWITCHES.cudnn_sdp_enabled())
        return stock(query, *arguments, **others)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    sequences = [lm.ids(9), lm.ids(5, seed=1)] if padded else [lm.ids(9)]
    batch = lm.pad(sequences, "left")
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with apply(model, system, **options):
        model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(seen) >= 2 * 3
    assert not any(seen)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_step_builds_no_plan(masked: bool) -> None:
    query = torch.randn(1, 8, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 2, 777, 64, device=DEVICE, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, 1, 777, dtype=torch.bool, device=DEVICE) if masked else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        single_query_attention(query, key, value, 0.125, mask)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert any("flash" in name or "fmha" in name for name in names), names
    assert not any("cudnn" in name for name in names), names
