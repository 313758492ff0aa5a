import pytest
import torch

from draftattn.kernels.block_mask import BlockMask

pytest.importorskip("triton")
from draftattn.kernels import triton_decode

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # the interpreter's log2 of an empty row
]
GPU = torch.cuda.is_available()


def attend(case, splits=None):
    """The kernel's output and LSE of a case, with the number of parts given, or all as it chooses."""
    plan = triton_decode._plan_for(case.query, case.key, case.mask, 16)
    if splits is not None:
        plan = plan._replace(splits=splits)
        if not GPU:  # the interpreter takes as long for a small tile as for a large one
            rows = plan.pack * case.mask.largest_query_block
            plan = plan._replace(rows=64, tiles_m=-(-rows // 64), merge_rows=64)
    scale = case.spec.head_dim**-0.5 if case.spec.scale is None else case.spec.scale
    return triton_decode.attention_forward(
        case.query,
        case.key,
        case.value,
        case.mask,
        scale=scale,
        causal=case.spec.causal,
        residual=case.residual,
        return_lse=True,
        plan=plan,
    )


def test_against_float64(case, judge):
    if case.spec.dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter gets bf16 products wrong")
    if case.spec.batch * case.spec.heads * len(case.spec.query_blocks) > 36 and not GPU:
        pytest.skip("takes Triton's interpreter too long")
    judge(case, *attend(case, splits=3))


DECODE = dict(query_blocks=(1,), query_block_size=1, key_blocks=(16, 9, 16, 0, 16, 16, 1, 16, 16, 16, 3), block_size=16)


@pytest.mark.parametrize(("splits", "mask_heads"), [(1, 1), (2, 4), (5, 2), (40, 1)])
def test_any_number_of_parts(make_case, judge, splits, mask_heads):
    """Also more parts than blocks: the surplus holds nothing."""
    case = make_case(
        **DECODE, batch=2, heads=4, kv_heads=2, mask_heads=mask_heads, mask_batch=2, lse=True, density=0.8,
        residual=splits == 5, empty_row=False, transposed=True,
    )  # fmt: skip
    judge(case, *attend(case, splits=splits))


def test_the_same_on_every_run(make_case):
    case = make_case(**DECODE, heads=2, kv_heads=1, density=2.0, empty_row=False)
    (once, lse_once), (again, lse_again) = attend(case, splits=3), attend(case, splits=3)
    assert torch.equal(once, again)
    assert torch.equal(lse_once, lse_again)


def test_its_own_plan(make_case, judge):
    case = make_case(
        query_blocks=(1,), query_block_size=1, key_blocks=(64,) * 12 + (3,), heads=4, kv_heads=1, density=2.0,
        empty_row=False, lse=True, dtype=torch.float16,
    )  # fmt: skip
    assert triton_decode.serves(case.query, case.key, case.mask)
    judge(case, *attend(case))


@pytest.mark.parametrize("query_blocks", [(5,), (16, 3), (40, 64, 13)], ids=str)
def test_rows_of_several_tokens_and_heads_share_tiles(make_case, judge, query_blocks):
    """A group of 6 heads does not divide the rows of a tile; keys are those of a cache, longer than the queries."""
    case = make_case(
        query_blocks=query_blocks, key_blocks=(64, 50, 64, 64, 30), heads=6, kv_heads=1, causal=True, lse=True,
        query_block_size=max(query_blocks), density=2.0, empty_row=False,
    )  # fmt: skip
    judge(case, *attend(case, splits=2))


@pytest.mark.parametrize(("block_size", "entries"), [(4, 32), (16, 8), (32, 4), (48, 2)])
def test_small_key_blocks_share_tiles(make_case, judge, block_size, entries):
    blocks = (block_size, block_size - 1, 0, 1) * 4 + (block_size,) * 3
    case = make_case(
        query_blocks=(2, 1), key_blocks=blocks, block_size=block_size, query_block_size=2, heads=4, mask_heads=2,
        causal=True, window=2 * block_size, sink=3, whole=True, lse=True, density=1.2, empty_row=False,
        dtype=torch.float16,
    )  # fmt: skip
    assert triton_decode._plan_for(case.query, case.key, case.mask, 16).entries == entries
    judge(case, *attend(case, splits=3))


def mask_of(batch, query_blocks, key_blocks, mask_heads=1, query_block_size=1):
    """Shapes of a mask, without numbers."""
    return BlockMask(
        torch.empty(batch, mask_heads, query_blocks, dtype=torch.int32),
        torch.empty(1, 1, 1, 1, dtype=torch.int32).expand(batch, mask_heads, query_blocks, key_blocks),
        torch.empty(query_blocks + 1, dtype=torch.int32),
        torch.empty(key_blocks + 1, dtype=torch.int32),
        query_block_size=query_block_size,
    )


def tokens(batch, length, heads):
    return torch.empty(1, dtype=torch.bfloat16).expand(batch, length, heads, 128)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "key_blocks", "expected"),
    [
        pytest.param(1, 1, 32, 8, 1024, True, id="one sequence"),
        pytest.param(8, 1, 32, 8, 1024, True, id="batch of 8"),
        pytest.param(1, 16, 32, 8, 1024, True, id="speculative"),
        pytest.param(64, 1, 32, 8, 1024, False, id="large batch"),
        pytest.param(1, 1, 32, 8, 1, False, id="short"),
        pytest.param(1, 32768, 12, 12, 256, False, id="video"),
        pytest.param(1, 256, 4, 4, 1024, True, id="two query blocks"),
    ],
)
def test_serves_where_a_gpu_would_idle(batch, length, heads, kv_heads, key_blocks, expected):
    size = min(length, 128)
    mask = mask_of(batch, length // size, key_blocks, query_block_size=size)
    query, key = tokens(batch, length, heads), tokens(batch, key_blocks * 128, kv_heads)
    assert triton_decode.serves(query, key, mask, 132) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_a_long_cache(make_case, judge, block_size, dtype):
    case = make_case(
        query_blocks=(1,), query_block_size=1, key_blocks=(block_size - 1, *(block_size,) * (8192 // block_size)),
        block_size=block_size, batch=3, heads=8, kv_heads=2, mask_heads=2, mask_batch=3, head_dim=128, causal=True,
        key_offsets_per_item=True, empty_row=False, lse=True, dtype=dtype,
    )  # fmt: skip
    judge(case, *attend(case))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_replays_in_a_graph(make_case):
    case = make_case(
        query_blocks=(1,), query_block_size=1, key_blocks=(128,) * 64, block_size=128, batch=2, heads=8, kv_heads=2,
        head_dim=128, empty_row=False, dtype=torch.bfloat16,
    )  # fmt: skip
    attend(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attend(case)
    case.query.copy_(torch.randn_like(case.query))
    case.mask.kv_num_blocks.fill_(17)
    graph.replay()
    assert torch.equal(out, attend(case)[0])


def test_compiles_without_a_gpu(compile_ahead):
    for kernel in compile_ahead("compile_decode.py", ["decode:90:bf16:128", "decode:86:fp16:128", "sum:90:bf16:128"]):
        assert kernel["stack_bytes"] == 0, kernel
        # two programs of a multiprocessor, on every GPU
        assert kernel["shared_kb"] <= (113 if ":90:" in kernel["job"] else 49), kernel
