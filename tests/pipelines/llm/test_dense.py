"""Dense decoding steps: what they compute, and with which of torch's kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from draftattn.pipelines.llm.dense import single_query_attention, without_cudnn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SWITCHES = torch.backends.cuda


def literal(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The definition, in float64."""
    group = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("num_keys", [1, 37, 1001])
def test_single_query_attention(num_keys: int, heads: int, kv_heads: int, masked: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(num_keys)
    query = torch.randn(3, heads, 1, 32, device=DEVICE, dtype=dtype)
    key, value = torch.randn(2, 3, kv_heads, num_keys, 32, device=DEVICE, dtype=dtype)
    mask = None
    if masked:
        mask = torch.rand(3, 1, 1, num_keys, device=DEVICE) < 0.5
        mask[..., -1] = True
    output = single_query_attention(query, key, value, 0.3, mask)
    assert output.dtype == dtype
    assert output.shape == (3, 1, heads, 32)
    exact = literal(query, key, value, 0.3, mask)
    error = (output.double() - exact).norm() / exact.norm()
    assert error <= (5e-6 if dtype == torch.float32 else 8e-3)


def test_other_kernels_serve_in_place_of_cudnn() -> None:
    assert SWITCHES.cudnn_sdp_enabled()
    with without_cudnn():
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
