import numpy as np
import pytest
import torch

from draftattn.kernels import backends

pytest.importorskip("triton")

from draftattn.kernels import triton_forward

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # the interpreter's log2 of an empty row
]


@pytest.fixture(autouse=True)
def _mend_interpreter(monkeypatch):
    """Triton's interpreter multiplies bf16 as if its bits were integers, and truncates where a GPU rounds to bf16.

    The backend refuses bf16 there for that reason; mended, the interpreter shows that the kernel is right.
    """
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def mended_cast(self, operand, dtype):
        if operand.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(operand.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, operand, dtype)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    )
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", mended_cast)
    monkeypatch.setattr(backends, "_interpreter_is_wrong", lambda dtype: False)


@pytest.fixture(params=["pointers", "descriptors"])
def _tiles(request, monkeypatch):
    """Both ways to read tiles of keys; a GPU takes descriptors only where its rule allows them."""
    if request.param == "pointers":
        monkeypatch.setattr(triton_forward, "_can_describe", lambda x: False)
    elif not torch.cuda.is_available():
        monkeypatch.setattr(triton_forward, "_can_describe", lambda x: x.numel() > 0)


@pytest.mark.usefixtures("_tiles")
def test_against_float64(case, judge):
    judge(case, *case.run("triton", return_lse=case.spec.lse))


@pytest.mark.parametrize("sink", [0, 70], ids=["no-sink", "sink"])
@pytest.mark.parametrize("heads", [1, 4], ids=["rows", "packed"])
@pytest.mark.usefixtures("_tiles")
def test_blocks_that_a_window_hides_are_not_read(make_case, heads, sink):
    case = make_case(
        query_blocks=(16, 9, 16, 16),
        key_blocks=(64,) * 6,
        query_block_size=16,
        heads=heads,
        kv_heads=1,
        causal=True,
        window=50,
        sink=sink,
        density=2.0,
        empty_row=False,
    )
    # the first query stands at key 384 - 57 and sees keys from 278 on, which the fifth block holds
    out, lse = case.run("triton")
    case.value[:, 128:256] = torch.nan
    case.key[:, 128:256] = torch.nan
    for result, expected in zip(case.run("triton"), (out, lse), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("window", [64, 65, 66])
def test_windows_that_end_at_a_block(make_case, judge, window):
    options = dict(causal=True, window=window, density=2.0, empty_row=False)
    case = make_case(query_blocks=(64, 64, 64), **options)
    judge(case, *case.run("triton"))


@pytest.mark.usefixtures("_tiles")
def test_packed_heads_with_tokens_outside_the_blocks(make_case, judge):
    options = dict(query_block_size=4, heads=4, kv_heads=2, uncovered=(3, 5), density=2.0, lse=True)
    case = make_case(query_blocks=(4, 3, 4), key_blocks=(64, 40), **options)
    judge(case, *case.run("triton"))


def test_heads_of_a_group_share_tiles(make_case, monkeypatch):
    programs = []
    kernel = triton_forward.attention_forward_kernel
    spy = type("Spy", (), {"__getitem__": lambda self, grid: programs.append(grid) or kernel[grid]})
    monkeypatch.setattr(triton_forward, "attention_forward_kernel", spy())
    for rows, mask_heads in ((4, 2), (4, 1), (4, 8), (64, 2)):
        case = make_case(
            query_blocks=(rows, rows),
            query_block_size=rows,
            heads=8,
            kv_heads=2,
            mask_heads=mask_heads,
            density=2.0,
            empty_row=False,
        )
        case.run("triton")
    # 2 query blocks and a program for the rest; heads packed where the mask is shared and 4 heads of a block fit
    assert programs == [(3, 2, 1), (3, 2, 1), (3, 8, 1), (3, 8, 1)]


def test_tokens_too_far_apart_are_refused(make_case, monkeypatch):
    case = make_case(query_blocks=(64, 64))
    far = torch.empty_strided((1, 128, 2, 32), (1, 2**27, 32, 1), device="meta")
    with pytest.raises(ValueError, match="key has tokens 134217728 elements apart"):
        triton_forward.attention_forward(
            case.query, far, case.value, case.mask, scale=1.0, causal=False, residual=None, return_lse=False
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_video_size(make_case, judge, causal, dtype):
    options = dict(heads=4, kv_heads=2, mask_heads=4, head_dim=128, density=0.25, residual=True, lse=True)
    case = make_case(query_blocks=(112,) * 35 + (97,), block_size=128, causal=causal, dtype=dtype, **options)
    judge(case, *case.run("triton"))


@pytest.mark.parametrize("limit", [227, 99], ids=["hopper", "consumer"])
@pytest.mark.parametrize("block_size", [1, 16, 48, 128])
@pytest.mark.parametrize("query_rows", [1, 24, 128])
def test_tiles_cover_a_block(block_size, query_rows, limit):
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (16, 64, 80, 128, 256):
            tiling = triton_forward.choose_tiling(dtype, head_dim, query_rows, block_size, limit * 1024)
            for tile, length in ((tiling.rows, query_rows), (tiling.columns, block_size)):
                assert 16 <= tile <= max(16, 2 * length)


def test_compiles_without_a_gpu(compile_ahead):
    jobs = ["90:bf16:128:plain", "90:bf16:128:residual", "90:bf16:128:window", "90:fp32:64:all", "86:fp16:128:all"]
    for kernel in compile_ahead("compile_triton_forward.py", jobs):
        assert kernel["shared_kb"] <= (227 if kernel["capability"] == 90 else 99), kernel
        # with options a few dozen bytes spill, outside the matrix products
        assert kernel["stack_bytes"] in range(1 if kernel["options"] == "plain" else 193), kernel
