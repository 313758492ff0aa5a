import re

import pytest
import torch
import torch.nn.functional as F

from draftattn.kernels import backends
from draftattn.kernels.api import block_sparse_attention
from draftattn.kernels.block_mask import BlockMask
from draftattn.kernels.varlen import padded_offsets, varlen_mask, varlen_offsets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(backends.triton_version() is None, reason="needs Triton")


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


@pytest.mark.parametrize("lengths", [(5,), (0, 0), (16, 16), (1, 0, 33, 15, 16, 17, 0), (100, 1)], ids=str)
def test_blocks_of_packed_sequences(lengths):
    total = sum(lengths) + 3  # the last tokens belong to no sequence
    offsets, sequence = varlen_offsets(cumulative(lengths), total, block_size=16)
    assert offsets.dtype == sequence.dtype == torch.int32
    assert len(sequence) == len(offsets) - 1 == total // 16 + len(lengths)
    expected = []
    first = 0
    for i, length in enumerate(lengths):
        expected += [(first + j, first + min(j + 16, length), i) for j in range(0, length, 16)]
        first += length
    expected += [(first, first, len(lengths))] * (len(sequence) - len(expected))
    found = zip(offsets[:-1].tolist(), offsets[1:].tolist(), sequence.tolist(), strict=True)
    assert list(found) == expected


def per_sequence(query, key, value, query_lengths, key_lengths, causal, window=None, sink=0):
    """Attention over each sequence by itself, in float64."""
    out = torch.zeros_like(query, dtype=torch.float64)
    q0 = k0 = 0
    for q, k in zip(query_lengths, key_lengths, strict=True):
        position, j = torch.arange(q)[:, None] + k - q, torch.arange(k)
        seen = (j <= position) | torch.tensor(not causal)
        if window is not None:
            seen = seen & ((j > position - window) | (j < sink))
        blind = ~seen.any(-1, keepdim=True)
        q_, k_, v_ = (
            x[:, a : a + n].double().cpu().transpose(1, 2) for x, a, n in ((query, q0, q), (key, k0, k), (value, k0, k))
        )
        if q and k:
            attended = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=seen | blind, enable_gqa=True)
            out[:, q0 : q0 + q] = attended.masked_fill(blind, 0.0).transpose(1, 2).to(out.device)
        q0, k0 = q0 + q, k0 + k
    return out


LENGTHS = {
    "self": ((20, 0, 37, 1, 16), (20, 0, 37, 1, 16)),
    "prompts after a cache": ((5, 3, 17), (40, 3, 32)),
    "decode": ((1, 1, 1, 1), (33, 5, 64, 1)),
    "more queries than keys": ((9, 4), (4, 0)),
}
RULES = {"full": (False, None, 0), "causal": (True, None, 0), "window": (True, 7, 0), "sinks": (True, 5, 3)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", ["reference", pytest.param("decode", marks=needs_triton)])
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_equals_each_sequence_by_itself(lengths, rule, backend):
    if backend == "decode" and lengths == "self" and DEVICE == "cpu":
        pytest.skip("takes Triton's interpreter too long")
    query_lengths, key_lengths = LENGTHS[lengths]
    causal, window, sink = RULES[rule]
    generator = torch.Generator().manual_seed(1)
    total_q, total_k = sum(query_lengths) + 2, sum(key_lengths) + 5
    query = torch.randn(1, total_q, 4, 16, generator=generator).to(DEVICE)
    key, value = torch.randn(2, 1, total_k, 2, 16, generator=generator).to(DEVICE)
    key[:, -5:] = value[:, -5:] = torch.nan  # packed tokens of no sequence
    mask = varlen_mask(
        cumulative(query_lengths), cumulative(key_lengths), total_q, total_k, causal=causal, window=window, sink=sink,
        block_size=16, query_block_size=1 if lengths == "decode" else 16, max_seqlen_k=max(key_lengths),
    )  # fmt: skip
    assert mask.kv_indices.shape[-1] == min(-(-max(key_lengths) // 16), mask.num_key_blocks)
    if backend == "reference":
        out = block_sparse_attention(query, key, value, mask, causal=causal, backend="reference")
    else:
        from draftattn.kernels import triton_decode

        out, _ = triton_decode.attention_forward(
            query, key, value, mask, scale=0.25, causal=causal, residual=None, return_lse=False
        )
    expected = per_sequence(query, key, value, query_lengths, key_lengths, causal, window, sink)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    # lists hold only blocks that count
    computed = mask.block_map[0, 0]
    if rule == "causal" and lengths == "self":
        assert computed.sum() == 3 + 6 + 1 + 1


def test_a_block_map_is_intersected():
    cu_seqlens = cumulative((20, 12))
    block_map = torch.ones(1, 3, 4, 4, dtype=torch.bool, device=DEVICE)
    block_map[:, 1, 1, 0] = False
    mask = varlen_mask(cu_seqlens, cu_seqlens, 32, 32, causal=True, block_size=16, block_map=block_map)
    assert mask.kv_num_blocks[0].tolist() == [[1, 2, 1, 0], [1, 1, 1, 0], [1, 2, 1, 0]]
    assert mask.kv_indices[0, 1, 1, 0] == 1


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_items_equal_each_by_itself(padding):
    lengths, capacity = (37, 64, 5), 64
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(3, 4, 2, 16, generator=generator).to(DEVICE)
    key, value = torch.randn(2, 3, capacity, 2, 16, generator=generator).to(DEVICE)
    offsets = padded_offsets(torch.tensor(lengths).int().to(DEVICE), capacity, 16, padding=padding)
    for item, length in enumerate(lengths):
        unused = slice(length, None) if padding == "right" else slice(0, capacity - length)
        key[item, unused] = value[item, unused] = torch.nan
    mask = BlockMask.from_block_map(
        torch.ones(1, 1, 1, 4, dtype=torch.bool, device=DEVICE), torch.tensor([0, 4]).int().to(DEVICE), offsets, 16,
        query_block_size=4, query_shifts=offsets[:, -1:] - 4,
    )  # fmt: skip
    out = block_sparse_attention(query, key, value, mask, causal=True, backend="reference")
    for item, length in enumerate(lengths):
        used = slice(0, length) if padding == "right" else slice(capacity - length, None)
        alone = per_sequence(
            *(x[item : item + 1] for x in (query, key[:, used], value[:, used])), (4,), (length,), True
        )
        torch.testing.assert_close(out[item : item + 1].double(), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_builds_in_a_graph():
    """Nothing waits for the device."""
    cu_seqlens = cumulative((1000, 37, 2000))

    def build():
        return varlen_mask(cu_seqlens, cu_seqlens, 3100, 3100, causal=True, window=300, sink=4)

    expected = build()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = build()
    graph.replay()
    assert torch.equal(mask.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(mask.block_map, expected.block_map)


def test_refusals():
    cu_seqlens = cumulative((4, 4))
    with pytest.raises(ValueError, match=re.escape("cu_seqlens must be int32 [N + 1]; got torch.int64 [3]")):
        varlen_offsets(cu_seqlens.long(), 8)
    with pytest.raises(ValueError, match="must describe as many sequences"):
        varlen_mask(cu_seqlens, cu_seqlens[:-1], 8, 4, causal=True)
    with pytest.raises(ValueError, match="sink is 4 without a window"):
        varlen_mask(cu_seqlens, cu_seqlens, 8, 8, causal=True, sink=4)
    with pytest.raises(ValueError, match=re.escape("block_map must be bool [1, H, 2, 2]; got torch.bool [1, 1, 2, 3]")):
        varlen_mask(cu_seqlens, cu_seqlens, 8, 8, causal=True, block_map=torch.ones(1, 1, 2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="padding is 'middle'; choose left or right"):
        padded_offsets(cu_seqlens, 8, padding="middle")
