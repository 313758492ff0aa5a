import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from draftattn.kernels import backends

pytest.importorskip("triton")
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


def test_against_float64(case, judge):
    judge(case, *case.run("triton", return_lse=case.spec.lse))


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
def test_tiles_cover_a_block(block_size, limit):
    from draftattn.kernels.triton_forward import choose_tiling

    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (16, 64, 80, 128, 256):
            tiling = choose_tiling(dtype, head_dim, block_size, limit * 1024)
            assert min(tiling.rows, tiling.columns) >= 16
            assert max(tiling.rows, tiling.columns) <= max(16, 2 * block_size)


def test_compiles_without_a_gpu():
    script = Path(__file__).with_name("compile_triton_forward.py")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", str(script), "90:bf16:128", "90:fp32:64", "86:fp16:128"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel["shared_kb"] <= (227 if kernel["capability"] == 90 else 99), kernel
        # a few dozen bytes of spills do no harm
        assert kernel["stack_bytes"] in range(129), kernel
