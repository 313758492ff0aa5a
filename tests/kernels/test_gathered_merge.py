import pytest
import torch

from draftattn.kernels.gathered_merge import merge_gathered, merge_gathered_reference


def make(dtype, device, head_dim=24, heads=3):
    generator = torch.Generator().manual_seed(0)
    length, slots = 37, 4
    wide = torch.randn(length, heads + 1, head_dim, generator=generator)
    lse = torch.randn(length, heads, generator=generator) * 3
    lse[5] = -torch.inf  # no key of its own
    total = length * heads * slots
    parts = torch.randn(total, head_dim, generator=generator)
    part_lses = torch.randn(total, generator=generator) * 3
    place = torch.randperm(total, generator=generator).view(length, heads, slots)
    part_lses[place[6, 1]] = -torch.inf
    part_lses[place[7, 0, 2]] = -torch.inf
    lse[6, 1] = -torch.inf
    parts[place[6, 1]] = wide[6, 2] = 0
    tensors = wide.to(dtype)[:, 1:], lse.T, parts.to(dtype), part_lses, place
    return [x.to(device) for x in tensors]


def softmax_over_parts(output, lse, parts, part_lses, place, dtype):
    values = torch.cat([output.to(dtype)[:, :, None], parts.to(dtype)[place]], dim=2)
    weights = torch.cat([lse.T.to(dtype)[..., None], part_lses.to(dtype)[place]], dim=2)
    shares = weights.softmax(-1).nan_to_num(0.0)
    return (shares[..., None] * values).sum(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_the_kernel_and_the_reference_are_a_softmax_over_parts(dtype, head_dim, device):
    from draftattn.kernels import triton_gathered_merge

    given = make(dtype, device, head_dim)
    truth = softmax_over_parts(*given, torch.float64)
    torchs = (softmax_over_parts(*given, torch.float32).to(dtype) - truth).norm()
    for merge in (merge_gathered, merge_gathered_reference, triton_gathered_merge.merge_gathered):
        merged = merge(*given)
        assert merged.dtype == dtype
        assert (merged - truth).norm() <= 2 * torchs + 1e-7 * truth.norm()
        assert not merged[6, 1].any()


def test_gradients(device):
    output, lse, parts, part_lses, place = make(torch.float64, device, head_dim=2, heads=2)
    lse, part_lses = (x.double().clamp(min=-5) for x in (lse, part_lses))
    leaves = [x.clone().requires_grad_() for x in (output[:6], lse[:, :6], parts[:20], part_lses[:20])]
    assert torch.autograd.gradcheck(lambda *x: merge_gathered(*x, place[:6] % 20), leaves)


def test_shapes_are_checked():
    output, lse, parts, part_lses, place = make(torch.float32, "cpu")
    with pytest.raises(ValueError, match="do not fit together"):
        merge_gathered(output, lse.T, parts, part_lses, place)
    with pytest.raises(ValueError, match="parts must be"):
        merge_gathered(output, lse, parts[:, :3], part_lses, place)
