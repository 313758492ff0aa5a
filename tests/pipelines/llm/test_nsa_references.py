"""Native Sparse Attention against other people's code, where the definitions agree."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from draftattn.pipelines.llm import apply
from draftattn.pipelines.llm.nsa_attention import nsa_attention
from draftattn.pipelines.llm.nsa_compressed_attention import attend_compressed, select_blocks
from draftattn.pipelines.llm.nsa_compression import LinearCompression, MeanCompression, count_compressed
from draftattn.pipelines.llm.nsa_config import NSAConfig

GROUP = 16  # flash-linear-attention wants as many query heads to a key head
BLOCK, NUM_SELECTED, LENGTH, HEAD_DIM = 8, 4, 75, 16


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def test_branches_equal_those_of_flash_linear_attention() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        naive = pytest.importorskip("fla.ops.nsa.naive")
    config = NSAConfig.mean_pooled(block_size=BLOCK, num_selected=NUM_SELECTED, window=7)
    torch.manual_seed(0)
    query = 2 * torch.randn(2, LENGTH, 2 * GROUP, HEAD_DIM)
    key, value = torch.randn(2, 2, LENGTH, 2, HEAD_DIM).unbind()
    scale = HEAD_DIM**-0.5
    count = count_compressed(LENGTH, config)
    compressed_key, compressed_value = (MeanCompression(config)(x[:, : count * BLOCK]) for x in (key, value))
    # theirs pools the ragged block at the end too, which nobody sees
    tail_key, tail_value = (
        torch.cat([pooled, x[:, count * BLOCK :].mean(1, keepdim=True)], 1)
        for pooled, x in ((compressed_key, key), (compressed_value, value))
    )

    output, lse = attend_compressed(query, compressed_key, compressed_value, 0, config, scale)
    exact, _ = attend_compressed(*(x.double() for x in (query, compressed_key, compressed_value)), 0, config, scale)
    their_output, their_lse = naive.naive_nsa_compression(query, tail_key, tail_value, BLOCK, scale)
    assert relative_error(output, exact) <= 2 * relative_error(their_output, exact)
    torch.testing.assert_close(lse, their_lse.transpose(1, 2))

    mask = select_blocks(query, compressed_key, lse, 0, LENGTH, config, scale)
    ids = naive.naive_nsa_topk(query, tail_key, NUM_SELECTED, BLOCK, scale)
    theirs = torch.zeros(2, LENGTH, 2, mask.num_key_blocks + 1, dtype=torch.bool)
    theirs.scatter_(-1, ids % (mask.num_key_blocks + 1), True)
    assert torch.equal(mask.block_map, theirs[..., :-1].transpose(1, 2))

    only_selection = torch.tensor([0.0, 1.0, 0.0]).expand(2, LENGTH, 2 * GROUP, 3)
    selected, _ = nsa_attention(query, key, value, compressed_key, compressed_value, only_selection, config)
    exact, _ = nsa_attention(
        *(x.double() for x in (query, key, value, compressed_key, compressed_value, only_selection)), config
    )
    theirs = naive.naive_nsa_selection(query, key, value, ids, BLOCK, scale)
    assert relative_error(selected, exact) <= 2 * relative_error(theirs, exact)


def test_layer_equals_native_sparse_attention_pytorch() -> None:
    """With its weights, without rotary embedding, memory and overlap, and apart from queries at a block's end.

    It lets a query see a compressed block from the next token on, the paper from the block's last token on.
    """
    theirs = pytest.importorskip("native_sparse_attention_pytorch.native_sparse_attention")
    networks = pytest.importorskip("native_sparse_attention_pytorch.compress_networks")
    dim, heads, block = 32, 2, 8
    torch.manual_seed(0)
    layer = theirs.SparseAttention(
        dim, HEAD_DIM, heads, sliding_window_size=5, compress_block_size=block, compress_block_sliding_stride=block,
        selection_block_size=block, num_selected_blocks=2, causal=True, norm=False,
        compress_mlp=networks.SingleProjection(HEAD_DIM, block),
    ).double()  # fmt: skip
    for name, parameter in layer.named_parameters():
        # scores so moderate that it never leaves out a chosen block for a share below 1e-10
        torch.nn.init.normal_(parameter, std=0.1 if "compress.compress" in name else 0.2)
    with torch.no_grad():
        layer.rotary_emb.freqs.zero_()
        layer.v_intrablock_positions.zero_()
        # its memory token is what no query likes: the first channel of inputs and queries is 1
        layer.compress_mem_kv.zero_()
        layer.compress_mem_kv[0, ..., 0] = -1e6
        to_query = layer.to_qkv.weight[: heads * HEAD_DIM].view(heads, HEAD_DIM, dim)
        to_query[:, 0] = torch.eye(dim, dtype=torch.float64)[0]

    config = LlamaConfig(
        vocab_size=8, hidden_size=dim, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=HEAD_DIM,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    handle = apply(
        model, "nsa", compression_block=block, compression_stride=block, block_size=block, num_selected=3,
        initial_blocks=0, local_blocks=1, window=6,
    )  # fmt: skip
    attention, branches = model.model.layers[0].self_attn, handle.system.branches[0]
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.zero_()
        handle.system._turn = lambda x, positions: x
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for projection, weight in zip(projections, layer.to_qkv.weight.chunk(3), strict=True):
            projection.weight.copy_(weight)
        attention.o_proj.weight.copy_(layer.combine_heads.weight)
        branches.gate.weight.copy_(layer.to_strategy_combine[0].weight)
        branches.gate.bias.copy_(layer.to_strategy_combine[0].bias)
        for ours, their in (
            (branches.key_compression, layer.k_compress),
            (branches.value_compression, layer.v_compress),
        ):
            assert isinstance(ours, LinearCompression)
            weight = their.compress[1].weight.view(HEAD_DIM, block, HEAD_DIM)
            ours.weight.copy_(weight.permute(1, 2, 0).expand_as(ours.weight))
        branches.key_compression.offset.copy_(layer.k_intrablock_positions)

    x = torch.randn(2, 61, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1.0
    position_ids = torch.arange(61)[None]
    ranges = create_causal_mask(config=model.config, inputs_embeds=x, attention_mask=None, past_key_values=None)
    ours, _ = attention(
        hidden_states=x, attention_mask=ranges, position_ids=position_ids,
        position_embeddings=model.model.rotary_emb(x, position_ids),
    )  # fmt: skip
    inside = (torch.arange(61) + 1) % block != 0
    torch.testing.assert_close(ours[:, inside], layer(x)[:, inside], rtol=1e-8, atol=1e-8)
