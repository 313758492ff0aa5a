import pytest
import torch

from draftattn.kernels.gathered_merge import merge_gathered, merge_gathered_reference

BATCH, LENGTH, KV_HEADS, GROUP, SLOTS = 2, 37, 2, 3, 4


def make(dtype, device, head_dim=24):
    generator = torch.Generator().manual_seed(0)
    heads = KV_HEADS * GROUP
    wide = torch.randn(BATCH, LENGTH, heads + 1, head_dim, generator=generator)
    lse = torch.randn(BATCH, LENGTH, heads, generator=generator) * 3
    lse[:, 5] = -torch.inf  # no key of its own
    total = BATCH * LENGTH * heads * SLOTS
    parts = torch.randn(total, head_dim, generator=generator)
    part_lses = torch.randn(total, generator=generator) * 3
    place = torch.randperm(total, generator=generator).view(BATCH, KV_HEADS, SLOTS, LENGTH, GROUP).int()
    nothing = place[1, 0, :, 6, 1]  # nor any other
    part_lses[nothing] = lse[1, 6, 1] = -torch.inf
    parts[nothing] = wide[1, 6, 2] = 0
    part_lses[place[0, 0, 2, 7, 0]] = -torch.inf
    tensors = wide.to(dtype)[:, :, 1:], lse.transpose(1, 2), parts.to(dtype), part_lses, place
    return [x.to(device) for x in tensors]


def softmax_over_parts(output, lse, parts, part_lses, place, dtype):
    place = place.permute(0, 3, 1, 4, 2).flatten(2, 3).long()  # [B, N, H, P]
    values = torch.cat([output.to(dtype)[..., None, :], parts.to(dtype)[place]], dim=3)
    weights = torch.cat([lse.transpose(1, 2).to(dtype)[..., None], part_lses.to(dtype)[place]], dim=3)
    shares = weights.softmax(-1).nan_to_num(0.0)
    return (shares[..., None] * values).sum(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_the_kernel_and_the_reference_are_a_softmax_over_parts(dtype, head_dim, device, poisoned_memory):
    from draftattn.kernels import triton_gathered_merge

    given = make(dtype, device, head_dim)
    truth = softmax_over_parts(*given, torch.float64)
    torchs = (softmax_over_parts(*given, torch.float32).to(dtype) - truth).norm()
    for merge in (merge_gathered, merge_gathered_reference, triton_gathered_merge.merge_gathered):
        merged = merge(*given)
        assert merged.dtype == dtype
        assert (merged - truth).norm() <= 2 * torchs + 1e-7 * truth.norm()
        assert not merged[1, 6, 1].any()


def test_the_result_may_replace_what_it_is_merged_from(device):
    from draftattn.kernels import triton_gathered_merge

    for merge in (merge_gathered, triton_gathered_merge.merge_gathered):
        output, *rest = make(torch.float32, device)
        around = torch.randn(BATCH, LENGTH + 1, KV_HEADS * GROUP + 2, output.shape[3], device=device)
        before, inside = around.clone(), around[:, 1:, 1:-1]
        inside.copy_(output)
        merge(inside, *rest, out=inside)
        torch.testing.assert_close(inside, merge(output, *rest), rtol=0, atol=0)
        inside.copy_(before[:, 1:, 1:-1])
        assert torch.equal(around, before)


def test_the_result_may_have_any_strides(device):
    from draftattn.kernels import triton_gathered_merge

    for merge in (merge_gathered, triton_gathered_merge.merge_gathered):
        output, *rest = make(torch.float32, device)
        expected = merge(output, *rest)
        around = torch.zeros(*output.shape, 2, device=device)
        inside = around[..., 0]
        inside.copy_(output)
        assert merge(inside, *rest, out=inside) is inside
        torch.testing.assert_close(inside, expected, rtol=0, atol=0)
        assert not around[..., 1].any()


def test_gradients(device):
    output, lse, parts, part_lses, place = make(torch.float64, device, head_dim=2)
    lse, part_lses = (x.double().clamp(min=-5) for x in (lse, part_lses))
    leaves = [x.clone().requires_grad_() for x in (output[:, :2], lse[:, :, :2], parts[:20], part_lses[:20])]
    assert torch.autograd.gradcheck(lambda *x: merge_gathered(*x, place[..., :2, :] % 20), leaves)


def test_shapes_are_checked():
    output, lse, parts, part_lses, place = make(torch.float32, "cpu")
    with pytest.raises(ValueError, match="do not fit together"):
        merge_gathered(output, lse.transpose(1, 2), parts, part_lses, place)
    with pytest.raises(ValueError, match="do not fit together"):
        merge_gathered(output, lse, parts, part_lses, place[:, :1])
    with pytest.raises(ValueError, match="parts must be"):
        merge_gathered(output, lse, parts[:, :3], part_lses, place)
    with pytest.raises(ValueError, match="out must be"):
        merge_gathered(output.clone().requires_grad_(), lse, parts, part_lses, place, out=output)
