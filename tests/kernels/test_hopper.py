import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    # each pair compiles a kernel per combination of flags, seconds each: the other two pairs add nothing
    [(torch.bfloat16, 128), (torch.float16, 64)],
    ids=["bf16-D128", "fp16-D64"],
)
def test_against_float64(case, make_case, judge, dtype, head_dim):
    options = {field.name: getattr(case.spec, field.name) for field in fields(case.spec) if field.name != "name"}
    # another name draws other blocks: enough of them that a small mask is not empty
    options |= dict(dtype=dtype, head_dim=head_dim, density=1.5 * case.spec.density)
    served = make_case(**options)
    judge(served, *served.run("hopper", return_lse=served.spec.lse))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_video_size(make_case, judge, causal, residual):
    options = dict(heads=4, kv_heads=2, mask_heads=4, head_dim=128, density=0.25, lse=True, dtype=torch.bfloat16)
    case = make_case(query_blocks=(112,) * 35 + (97,), block_size=128, causal=causal, residual=residual, **options)
    judge(case, *case.run("hopper"))


@pytest.mark.gpu
@on_hopper
def test_repeats_exactly(make_case):
    case = make_case(query_blocks=(128,) * 40, block_size=128, head_dim=128, dtype=torch.bfloat16, residual=True)
    first, _ = case.run("hopper")
    for _ in range(10):
        assert torch.equal(case.run("hopper")[0], first)


def test_compiles_without_a_gpu():
    script = Path(__file__).with_name("compile_hopper.py")
    jobs = ["bf16:128", "bf16:128:residual", "bf16:128:causal,residual,lse", "fp16:64:residual,lse"]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *jobs],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == len(jobs)
    for kernel in kernels:
        assert kernel["shared_kb"] <= 227, kernel
        # without options none; with all, the one warp that feeds the others may spill a few words
        assert kernel["stack_bytes"] <= (0 if not kernel["options"] else 32), kernel
        # 64 scores a thread: all their exponentials overlap with the product of probabilities and values
        assert kernel["overlapped"] >= 64, kernel
