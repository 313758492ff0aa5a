"""Turning channels in pairs, against complex numbers in float64."""

import pytest
import torch

from draftattn.kernels.rotary import turn_angles, turn_pairs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (21, 5)], ids=["all channels", "some channels"])
def test_pairs_turn_like_complex_numbers(dtype, head_dim, half, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, head_dim, generator=generator).to(dtype).to(device)
    positions = torch.randint(-(2**20), 2**20, (2, 7), generator=generator).to(device)
    frequencies = torch.logspace(0, -4, half, dtype=torch.float64, device=device)
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = turn_angles(positions, frequencies, wide)
    turned = turn_pairs(x, cos[:, :, None], sin[:, :, None])
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    angles = positions.double()[..., None] * frequencies
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    exact = torch.cat([pairs.real, pairs.imag, x[..., 2 * half :].double()], dim=-1)
    assert turned.dtype == dtype
    # one rounding to the dtype, after a few in the wide one
    limit = torch.finfo(dtype).eps + 4 * torch.finfo(wide).eps
    torch.testing.assert_close(turned.double(), exact, rtol=limit, atol=limit)
    assert torch.equal(turned[..., 2 * half :], x[..., 2 * half :])


def test_gradients(device):
    cos, sin = turn_angles(
        torch.arange(3, device=device), torch.ones(2, dtype=torch.float64, device=device), torch.float64
    )
    x = torch.randn(4, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: turn_pairs(x, cos, sin), (x,))
