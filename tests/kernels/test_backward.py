from dataclasses import replace

import pytest
import torch

from draftattn.kernels import reference
from draftattn.kernels.api import BlockMeans
from draftattn.kernels.block_mask import BlockMask
from tests.kernels.conftest import DEVICE, SPECS, Case, Spec, make_case, relative_error, torch_attention

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy says when a masked score overflows
]

NAMES = ("query", "key", "value", "mean_key", "mean_value")


# In the interpreter a case takes seconds: there, one per feature. On a GPU, all.
INTERPRETED = (
    "blocks-of-112", "rectangular-causal-111x63", "mqa-mask-per-head", "residual-ragged-lse", "residual-causal",
    "nothing", "key-offsets-per-item", "uncovered-tokens", "negative-scale", "shifts", "window-sink-whole",
    "window-starts-shifts", "small-query-blocks", "decode", "all-fp16", "head-dim-80", "head-dim-256-fp32",
)  # fmt: skip


def cases() -> list[Spec]:
    if DEVICE == "cuda":
        return SPECS
    # the interpreter gets bf16 wrong
    half = {torch.bfloat16: torch.float16}
    return [replace(spec, dtype=half.get(spec.dtype, spec.dtype)) for spec in SPECS if spec.name in INTERPRETED]


def options_of(case: Case) -> dict:
    scale = case.spec.head_dim**-0.5 if case.spec.scale is None else case.spec.scale
    return dict(scale=scale, causal=case.spec.causal)


def with_leaves(case: Case, dtype: torch.dtype) -> tuple[Case, list[torch.Tensor]]:
    """The case on the CPU with tensors that collect gradients; zeros where it holds NaN."""
    case = case.to(dtype, "cpu")
    tensors = (case.query, case.key, case.value, *(case.residual or ()))
    leaves = [x.detach().nan_to_num(0.0).requires_grad_() for x in tensors]
    residual = None if case.residual is None else BlockMeans(*leaves[3:])
    return replace(case, query=leaves[0], key=leaves[1], value=leaves[2], residual=residual), leaves


def random_gradients(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the output and of the LSE."""
    generator = torch.Generator().manual_seed(7)
    batch, length, heads, head_dim = case.query.shape
    grad_out = torch.randn(batch, length, heads, head_dim, generator=generator).to(case.spec.dtype)
    grad_lse = torch.randn(batch, heads, length, generator=generator) if case.spec.lse else None
    return grad_out, grad_lse


def exact_gradients(case, grad_out, grad_lse):
    """Output, LSE and gradients in float64."""
    case, leaves = with_leaves(case, torch.float64)
    out, lse = reference.attention_forward(
        case.query, case.key, case.value, case.mask, residual=case.residual, return_lse=True, **options_of(case)
    )
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + (lse.double().masked_fill(lse == -torch.inf, 0.0) * grad_lse).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, leaves)


def judge_gradients(case: Case, gradients, exact, grad_out, exact_lse) -> None:
    """Fails unless gradients err at most twice as much as those of torch's own attention in that dtype."""
    torch_case, leaves = with_leaves(case, case.spec.dtype)
    torch_out = torch_attention(torch_case, exact_lse)
    torch_gradients = torch.autograd.grad(torch_out, leaves, grad_out)
    # of the output alone, for torch gives no LSE
    _, _, torch_exact = exact_gradients(case, grad_out, None)
    floor = 1e-6 if case.spec.dtype == torch.float32 else 0.0
    for name, x, ours, theirs, theirs_exact in zip(NAMES, gradients, exact, torch_gradients, torch_exact, strict=False):
        assert x.dtype == case.spec.dtype
        assert x.shape == ours.shape
        error, allowed = relative_error(x, ours), 2 * relative_error(theirs, theirs_exact) + floor
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def backward_of(case: Case, **changes):
    """The gradients that the kernels make from an exact forward, and the exact ones."""
    from draftattn.kernels.triton_backward import attention_backward

    grad_out, grad_lse = random_gradients(case)
    exact_out, exact_lse, exact = exact_gradients(case, grad_out, grad_lse)
    inside = torch.zeros(case.query.shape[1], dtype=torch.bool)
    inside[int(case.mask.query_offsets[0]) : int(case.mask.query_offsets[-1])] = True
    poisoned = grad_out.masked_fill(~inside[:, None, None], torch.nan)
    arguments = dict(
        grad_out=poisoned.to(DEVICE),
        grad_lse=None if grad_lse is None else grad_lse.to(DEVICE),
        query=case.query,
        key=case.key,
        value=case.value,
        out=exact_out.to(DEVICE, case.spec.dtype),
        lse=exact_lse.to(DEVICE),
        block_mask=case.mask,
        residual=case.residual,
        **options_of(case),
    )
    return attention_backward(**(arguments | changes)), exact, grad_out, exact_lse


@pytest.mark.parametrize("spec", cases(), ids=lambda spec: spec.name)
def test_against_float64(spec):
    case = make_case(spec)
    judge_gradients(case, *backward_of(case))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the cases run with descriptors already, where it has TMA")
def test_descriptors_read_the_same():
    # the last tile reaches past the last block, where NaN stands
    spec = Spec("described", (37, 40, 0, 13), block_size=40, uncovered=(3, 70), residual=True, causal=True, density=0.5)
    case = make_case(spec)
    plain, *_ = backward_of(case, descriptors=False)
    described, exact, grad_out, exact_lse = backward_of(case, descriptors=True)
    judge_gradients(case, described, exact, grad_out, exact_lse)
    for name, x, y in zip(NAMES, described, plain, strict=True):
        torch.testing.assert_close(x, y, msg=name)


def test_every_tiling_gives_the_same():
    from draftattn.kernels.triton_backward import Tiling, Tilings

    case = make_case(Spec("tilings", (37, 48), (30, 48, 20), block_size=48, residual=True, lse=True, density=0.4))
    for tiling in (Tiling(16, 64, 4, 1), Tiling(32, 16, 4, 1)):
        judge_gradients(case, *backward_of(case, tilings=Tilings(tiling, tiling)))


@pytest.mark.parametrize("descriptors", [False, True] if DEVICE == "cpu" else [None])
def test_scores_so_low_that_masked_ones_overflow(descriptors):
    # a key past the end of its block reads as zeros, whose score of 0 is 1000 above all others
    case = make_case(Spec("low", (20, 13), block_size=32, head_dim=16, density=2.0, empty_row=False))
    case = replace(case, query=case.query - 16, key=case.key + 16)
    gradients, exact, *_ = backward_of(case, descriptors=descriptors)
    for name, x, y in zip(NAMES[:3], gradients, exact, strict=False):
        # scores of 1000 leave float32 four digits
        torch.testing.assert_close(x.cpu().double(), y, rtol=1e-2, atol=1e-2, msg=name)


def test_the_same_bits_on_every_run():
    case = make_case(Spec("repeated", (37, 40), (40, 31), block_size=40, residual=True, kv_heads=1, mask_heads=2))
    first, *_ = backward_of(case)
    second, *_ = backward_of(case)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_expanded_and_transposed_gradients_of_the_output():
    case = make_case(Spec("expanded", (30, 20), block_size=32, head_dim=16))
    dense = torch.ones(case.query.shape, device=DEVICE)
    expected, *_ = backward_of(case, grad_out=dense)
    expanded = torch.ones((), device=DEVICE).expand(case.query.shape)
    for grad_out in (expanded, dense.transpose(1, 3).contiguous().transpose(1, 3)):
        gradients, *_ = backward_of(case, grad_out=grad_out)
        assert all(torch.equal(x, y) for x, y in zip(gradients[:3], expected[:3], strict=True))


@pytest.mark.parametrize("sizes", [(0, 2, 30), (1, 0, 30), (1, 2, 0)], ids=["no-batch", "no-queries", "no-keys"])
def test_nothing_in_nothing_out(sizes):
    from draftattn.kernels.triton_backward import attention_backward

    batch, num_query_blocks, key_length = sizes
    query = torch.ones(batch, 15 * num_query_blocks, 2, 16, device=DEVICE)
    key = torch.ones(batch, key_length, 2, 16, device=DEVICE)
    offsets = (torch.arange(num_query_blocks + 1, dtype=torch.int32) * 15).to(DEVICE)
    block_map = torch.ones(1, 1, num_query_blocks, 1, dtype=torch.bool, device=DEVICE)
    mask = BlockMask.from_block_map(block_map, offsets, torch.tensor([0, key_length]).int().to(DEVICE), 30)
    lse = torch.full((batch, 2, query.shape[1]), -torch.inf, device=DEVICE)
    gradients = attention_backward(query, None, query, key, key, query, lse, mask, scale=1.0, causal=False)
    for x, gradient in zip((query, key, key), gradients, strict=False):
        assert gradient.shape == x.shape
        assert not gradient.any()


@pytest.mark.parametrize("block_size", [1, 16, 48, 128])
def test_tiles_cover_a_block(block_size):
    from draftattn.kernels.triton_backward import _launch_options, choose_tilings

    offsets = torch.tensor([0, block_size], dtype=torch.int32)
    mask = BlockMask.from_block_map(torch.ones(1, 1, 1, 1, dtype=torch.bool), offsets, offsets, block_size)
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (16, 64, 80, 128, 256):
            for limit in (227, 99):
                tilings = choose_tilings(dtype, head_dim, limit * 1024)
                for tiling in tilings:
                    options = _launch_options(tiling, mask, 4, holds_rows=tiling is tilings.query)
                    assert options["TILES_M"] * options["BLOCK_M"] >= block_size * options["PACK"]
                    assert options["TILES_N"] * options["BLOCK_N"] >= block_size
                    assert options["PACK"] == 1 or options["TILES_M"] == 1
                    assert min(options["BLOCK_M"], options["BLOCK_N"]) >= 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_video_size(causal, dtype):
    options = dict(heads=4, kv_heads=2, mask_heads=4, head_dim=128, density=0.25, residual=True, lse=True)
    case = make_case(Spec("video", (112,) * 35 + (97,), block_size=128, causal=causal, dtype=dtype, **options))
    judge_gradients(case, *backward_of(case))


def test_compiles_without_a_gpu(compile_ahead):
    kernels = compile_ahead("compile_triton_backward.py", ["90:bf16:128:plain", "86:fp16:128:plain"])
    assert len(kernels) == 4
    for kernel in kernels:
        assert kernel["shared_kb"] <= (227 if kernel["capability"] == 90 else 99), kernel
        # what is spilled once, outside the loop, does no harm
        assert kernel["stack_bytes"] in range(257), kernel
