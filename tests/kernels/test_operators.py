"""The attention call under autograd and torch.compile."""

import pytest
import torch

from draftattn.kernels import operators
from draftattn.kernels.api import BlockMeans, block_sparse_attention
from draftattn.kernels.block_mask import BlockMask, SlidingWindow
from draftattn.kernels.pooling import pool_blocks_reference
from draftattn.kernels.transposed import transposed_lists

OFFSETS = torch.tensor([0, 16, 30], dtype=torch.int32)
BLOCK_MAP = torch.tensor([[True, False], [True, True]])[None, None]

# whatever serves training on the machine at hand
BACKENDS = ["auto", "reference", "triton"]


def make_inputs(device, heads=(4, 2, 2), gradient=True):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 30, h, 16, generator=generator).to(device).requires_grad_(gradient) for h in heads]


def make_mask(device, **changes):
    block_map, offsets = BLOCK_MAP.to(device), OFFSETS.to(device)
    mask = BlockMask.from_block_map(block_map, offsets, offsets, 16)
    return BlockMask(mask.kv_num_blocks, mask.kv_indices, offsets, offsets, 16, **changes)


def loss_of(result):
    out, lse = result
    return (out * torch.linspace(-1, 1, 16, device=out.device)).square().sum() + lse.sum()


def gradients_of(function, inputs):
    return torch.autograd.grad(function(*inputs), inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_has_the_gradients_of_the_reference(backend, device):
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = make_inputs(device)
    means = [pool_blocks_reference(x, OFFSETS.to(device)).detach().requires_grad_() for x in inputs[1:]]

    def run(name):
        def function(*tensors):
            options = dict(residual=BlockMeans(*tensors[3:]), return_lse=True, causal=True, scale=0.4, backend=name)
            return loss_of(block_sparse_attention(*tensors[:3], make_mask(device), **options))

        return gradients_of(function, [*inputs, *means])

    for x, expected in zip(run(backend), run("reference"), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [0, 1], ids=["output", "lse"])
def test_a_loss_of_one_result_only(part, device):
    pytest.importorskip("triton")

    def run(backend):
        inputs = make_inputs(device)
        result = block_sparse_attention(*inputs, make_mask(device), return_lse=True, backend=backend)
        return torch.autograd.grad(result[part].square().sum(), inputs, materialize_grads=True)

    for x, expected in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_backend_is_called_directly(device, monkeypatch):
    monkeypatch.setattr(operators, "attention", None)
    inputs = make_inputs(device)
    with torch.no_grad():
        block_sparse_attention(*inputs, make_mask(device))
    block_sparse_attention(*make_inputs(device, gradient=False), make_mask(device))
    # differentiates itself
    assert block_sparse_attention(*inputs, make_mask(device), backend="reference").requires_grad


def test_transposed_lists_are_kept_with_the_mask(device):
    mask = make_mask(device)
    counts, ids = transposed_lists(mask)
    assert counts.tolist() == [[[2, 1]]]
    assert ids[0, 0, 0].tolist() == [0, 1]
    assert ids[0, 0, 1, :1].tolist() == [1]
    assert transposed_lists(mask)[1] is ids


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend, gradient, device):
    """With the mask built in the graph, too."""
    if backend == "triton":
        pytest.importorskip("triton")
    offsets = OFFSETS.to(device)

    def function(query, key, value, block_map):
        mask = BlockMask.from_block_map(block_map, offsets, offsets, 16)
        means = BlockMeans(*(pool_blocks_reference(x, offsets) for x in (key, value)))
        options = dict(residual=means, causal=True, return_lse=True, backend=backend)
        return loss_of(block_sparse_attention(query, key, value, mask, **options))

    inputs, block_map = make_inputs(device, gradient=gradient), BLOCK_MAP.to(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, block_map), function(*inputs, block_map))
    if gradient:
        ours, expected = (gradients_of(lambda *x, f=f: f(*x, block_map), inputs) for f in (compiled, function))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, SlidingWindow(9, 2)], ids=["plain", "window"])
def test_compiles_with_a_mask_from_outside(window, device):
    mask = make_mask(device, window=window, query_shifts=torch.zeros(2, dtype=torch.int32, device=device))
    inputs = make_inputs(device)

    def function(query, key, value):
        return block_sparse_attention(query, key, value, mask, causal=True).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, expected = gradients_of(compiled, inputs), gradients_of(function, inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_refusal_reaches_the_caller_of_compiled_code(device):
    inputs = make_inputs(device, gradient=False)
    inputs = [torch.nn.functional.pad(x, (0, 8)) for x in inputs]
    mask = make_mask(device)
    compiled = torch.compile(
        lambda *x: block_sparse_attention(*x, mask, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="head_dim 24 is not one of"):
        compiled(*inputs)


def test_what_the_operator_promises(device):
    """Schema, fake tensors and autograd registration, checked by torch."""
    mask, inputs = make_mask(device), make_inputs(device)
    arguments = (
        *inputs, None, None, mask.kv_num_blocks, mask.kv_indices, mask.query_offsets, mask.key_offsets, None,
        *transposed_lists(mask), None, None, None, 16, 16, None, 0, 0.25, False, True, "auto",
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.draftattn.block_sparse_attention.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
