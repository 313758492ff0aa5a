import importlib.util
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
    if case.mask.window is not None:
        pytest.skip("it knows no sliding window, and says so")
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


def _load_emulated_kernel():
    here = Path(__file__).parent
    spec = importlib.util.spec_from_file_location("emulate_gluon", here / "emulate_gluon.py")
    emulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulator)
    return emulator.load_emulated(here.parents[1] / "kernels" / "hopper.py")


EMULATED = {
    "rows-share-programs": dict(query_blocks=(50,) * 6, heads=4, kv_heads=2, mask_heads=4),
    "ragged": dict(query_blocks=(112, 97, 128, 0, 1, 64), batch=2, uncovered=(3, 70), residual=True),
    "causal-residual": dict(query_blocks=(112, 97, 128, 0, 1, 64), causal=True, residual=True, density=0.3),
    "shifts": dict(query_blocks=(32, 31), key_blocks=(37, 64, 0, 1, 50), causal=True, shifts="block", density=2.0),
    "negative-scale": dict(query_blocks=(128, 70), scale=-0.3),
    "nothing": dict(query_blocks=(128, 20), density=0.0),
    # five stages run ahead over short rows, so that queries are due early
    "head-dim-64": dict(query_blocks=(40,) * 8, heads=4, kv_heads=4, mask_heads=4, head_dim=64, density=0.3),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernel is tested")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("options", EMULATED.values(), ids=EMULATED.keys())
def test_emulated(make_case, judge, options):
    case = make_case(**dict(block_size=128, head_dim=128, dtype=torch.float16, lse=True) | options)
    scale = case.query.shape[-1] ** -0.5 if case.spec.scale is None else case.spec.scale
    options = dict(scale=scale, causal=case.spec.causal, residual=case.residual, return_lse=True)
    judge(case, *_load_emulated_kernel().attention_forward(case.query, case.key, case.value, case.mask, **options))


def test_compiles_without_a_gpu(compile_ahead):
    jobs = ["bf16:128", "bf16:128:residual", "bf16:128:causal,residual,lse", "fp16:64:residual,lse"]
    for kernel in compile_ahead("compile_hopper.py", jobs):
        assert kernel["shared_kb"] <= 227, kernel
        # without options none; with all, what is needed once a row may be spilled, but nothing in the loops over tiles
        assert kernel["stack_bytes"] <= (0 if not kernel["options"] else 64), kernel
        assert kernel["spilled"] == 0, kernel
        # 64 scores a thread: all their exponentials overlap with the product of probabilities and values
        assert kernel["overlapped"] >= 64, kernel
