import pytest
import torch

from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.merge import merge_attention

OFFSETS = torch.tensor([0, 20, 52, 70], dtype=torch.int32)


def split_masks(device):
    """A mask and a division of its pairs into two masks; each part has an empty row, and row 1 is empty in all."""
    union = torch.tensor([[[1, 1, 1], [0, 0, 0], [1, 0, 1]], [[0, 1, 1], [0, 0, 0], [1, 1, 1]]]).bool()
    first = torch.tensor([[[1, 0, 1], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 1, 1]]]).bool()
    offsets = OFFSETS.to(device)
    return [
        BlockMask.from_block_map(block_map[None].to(device), offsets, offsets, 32)
        for block_map in (union, first, union & ~first)
    ]


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("triton", torch.float32)])
def test_two_halves_make_a_whole(backend, dtype, device):
    if backend == "triton":
        pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 70, heads, 16, dtype=dtype, generator=generator).to(device) for heads in (2, 1, 1)]
    grad_out = torch.randn(1, 70, 2, 16, dtype=dtype, generator=generator).to(device)
    grad_lse = torch.randn(1, 2, 70, generator=generator).to(device)
    union, *parts = split_masks(device)

    def attend(mask):
        return block_sparse_attention(*leaves, mask, return_lse=True, backend=backend)

    results = []
    for run in (lambda: attend(union), lambda: merge_attention(*zip(*map(attend, parts), strict=True))):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = run()
        seen = lse.detach() > -torch.inf
        assert 0 < seen.float().mean() < 1
        loss = (out * grad_out).sum() + (lse.masked_fill(~seen, 0.0) * grad_lse).sum()
        results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    for whole, merged in zip(*results, strict=True):
        assert merged.isfinite().all() or merged.ndim == 3
        # the LSE is float32
        torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


def test_gradients_of_outputs_and_lses():
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(1, 3, 2, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge_attention(x[:3], x[3:]), (*outputs, *lses))


def test_parts_that_saw_nothing():
    nothing = torch.tensor([-torch.inf, -torch.inf, 0.5]).view(1, 1, 3)
    outputs = [torch.zeros(1, 3, 1, 2, requires_grad=True), torch.ones(1, 3, 1, 2, requires_grad=True)]
    lses = [
        nothing.clone().requires_grad_(),
        torch.tensor([-torch.inf, 0.3, -torch.inf]).view(1, 1, 3).requires_grad_(),
    ]
    out, lse = merge_attention(outputs, lses)
    assert lse.flatten().tolist() == pytest.approx([-torch.inf, 0.3, 0.5])
    assert out[0, :, 0, 0].tolist() == [0.0, 1.0, 0.0]
    (out.sum() + lse[..., 1:].sum()).backward()
    for x in (*outputs, *lses):
        assert x.grad.isfinite().all()
    assert not lses[0].grad[..., :2].any()


def test_half_precision_keeps_its_dtype_and_merges_in_float32():
    outputs = [
        torch.full((1, 1, 1, 2), 1000.0, dtype=torch.float16),
        torch.full((1, 1, 1, 2), 1.0, dtype=torch.float16),
    ]
    out, lse = merge_attention(outputs, [torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)])
    assert out.dtype == torch.float16
    assert lse.dtype == torch.float32
    assert out.flatten().tolist() == [500.5, 500.5]


@pytest.mark.parametrize(
    ("outputs", "lses", "message"),
    [
        ([], [], "got 0 outputs and 0 LSEs"),
        ([(1, 3, 2, 4)], [], "got 1 outputs and 0 LSEs"),
        ([(1, 3, 2, 4), (1, 3, 2, 5)], [(1, 2, 3), (1, 2, 3)], "outputs must share shape and dtype"),
        ([(1, 3, 2, 4)], [(1, 3, 2)], r"the LSE of part 0 must be \[1, 2, 3\]; got \[1, 3, 2\]"),
    ],
    ids=["none", "no-lse", "shapes", "lse-shape"],
)
def test_refusals(outputs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge_attention([torch.zeros(shape) for shape in outputs], [torch.zeros(shape) for shape in lses])
