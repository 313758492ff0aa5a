"""Draft attention on tensors against plain attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from draftattn import BlockLayout, BlockMask, DraftConfig, InputError, TokenGrid, block_layout, draft_attention
from draftattn.inputs import AttentionInputs
from draftattn.policies.draft import DraftPolicy
from draftattn.policy import CallContext

GRIDS = [TokenGrid(2, 16, 16), TokenGrid(3, 5, 7), TokenGrid(1, 1, 1)]
BACKENDS = ["reference", "auto"]


def random_qkv(num_tokens: int, batch: int = 2, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, num_tokens, heads_of, 16) for heads_of in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention in [B, S, H, D]; key and value heads are repeated, the mask is additive or boolean."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).transpose(1, 2)


def mask_of(tensors: list[Tensor], layout: BlockLayout, config: DraftConfig, lengths: Tensor | None) -> BlockMask:
    return DraftPolicy(config)(AttentionInputs(*tensors, layout, lengths), CallContext())


def token_mask(mask: BlockMask, batch: int, num_keys: int) -> Tensor:
    """``[B, H, S, S]``; keys past an item's text are masked."""
    rows = [mask.to_dense(item) for item in range(batch)]
    return torch.stack([F.pad(row, (0, num_keys - row.shape[-1])) for row in rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("selection", ["row", "head"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
class TestSparsityZero:
    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_equals_dense(self, grid: TokenGrid, residual: bool, selection: str, backend: str) -> None:
        layout = block_layout(grid, block_size=32)
        tensors = random_qkv(layout.num_tokens)
        config = DraftConfig(sparsity=0, block_size=32, selection=selection, residual=residual, backend=backend)
        for scale in (None, 0.5):
            torch.testing.assert_close(
                draft_attention(*tensors, layout, config, scale=scale),
                sdpa(*tensors, scale=scale),
                rtol=1e-4,
                atol=1e-5,
            )

    def test_equals_dense_with_text_of_different_lengths(self, residual: bool, selection: str, backend: str) -> None:
        layout = block_layout(TokenGrid(3, 5, 7), block_size=32, num_text_tokens=20)
        tensors, lengths = random_qkv(layout.num_tokens, batch=3), torch.tensor([20, 3, 0])
        config = DraftConfig(sparsity=0, block_size=32, selection=selection, residual=residual, backend=backend)
        valid = (torch.arange(125) < 105 + lengths[:, None])[:, None, None]
        output = draft_attention(*tensors, layout, config, text_lengths=lengths)
        torch.testing.assert_close(output, sdpa(*tensors, mask=valid), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("selection", ["row", "head"])
@pytest.mark.parametrize("lengths", [None, [20, 3]], ids=["full text", "padded text"])
class TestSparse:
    def test_without_residual_it_is_attention_under_the_mask(
        self, lengths: list[int] | None, selection: str, backend: str
    ) -> None:
        layout = block_layout(TokenGrid(3, 5, 7), block_size=16, num_text_tokens=20)
        tensors = random_qkv(layout.num_tokens)
        text_lengths = None if lengths is None else torch.tensor(lengths)
        config = DraftConfig(sparsity=0.7, block_size=16, selection=selection, residual=False, backend=backend)
        allowed = token_mask(mask_of(tensors, layout, config, text_lengths), 2, layout.num_tokens)
        assert allowed.float().mean() < 0.7
        output = draft_attention(*tensors, layout, config, text_lengths=text_lengths)
        torch.testing.assert_close(output, sdpa(*tensors, mask=allowed), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("weighted", [False, True], ids=["plain means", "weighted means"])
    def test_residual_adds_the_means_of_skipped_blocks_weighted_by_their_tokens(
        self, weighted: bool, lengths: list[int] | None, selection: str, backend: str
    ) -> None:
        layout = block_layout(TokenGrid(3, 5, 7), block_size=16, num_text_tokens=20)
        query, key, value = tensors = random_qkv(layout.num_tokens)
        text_lengths = None if lengths is None else torch.tensor(lengths)
        config = DraftConfig(
            sparsity=0.7, block_size=16, selection=selection, residual=True, weighted_means=weighted, backend=backend
        )
        mask = mask_of(tensors, layout, config, text_lengths)

        video_blocks = layout.num_video_blocks
        block_lengths = layout.offsets.diff().tolist()
        means = literal_means(query, key, value, block_lengths, video_blocks, weighted)
        log_count = torch.tensor(block_lengths[:video_blocks]).log()
        rows = mask.block_map[..., :video_blocks].repeat_interleave(torch.tensor(block_lengths), dim=2)
        mean_bias = torch.where(rows, -torch.inf, log_count)
        token_bias = torch.zeros(()).masked_fill(~token_mask(mask, 2, layout.num_tokens), -torch.inf)
        expected = sdpa(
            query,
            torch.cat([key, means[0]], dim=1),
            torch.cat([value, means[1]], dim=1),
            mask=torch.cat([token_bias, mean_bias], dim=-1),
        )
        output = draft_attention(*tensors, layout, config, text_lengths=text_lengths)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def literal_means(
    query: Tensor, key: Tensor, value: Tensor, block_lengths: list[int], num_blocks: int, weighted: bool
) -> list[Tensor]:
    """Means of the first blocks, plain or weighted by the softmax of what a head's mean video query gives a token."""
    mean_query = query[:, : sum(block_lengths[:num_blocks])].mean(1)  # [B, H, D]
    mean_query = mean_query.unflatten(1, (key.shape[2], -1)).mean(2) * query.shape[-1] ** -0.5 * weighted
    means: list[list[Tensor]] = [[], []]
    for keys, values in zip(*(x.split(block_lengths, 1)[:num_blocks] for x in (key, value)), strict=True):
        weights = torch.softmax(torch.einsum("bshd,bhd->bsh", keys, mean_query), dim=1)
        for kept, x in zip(means, (keys, values), strict=True):
            kept.append(torch.einsum("bsh,bshd->bhd", weights, x))
    return [torch.stack(kept, dim=1) for kept in means]


def test_residual_is_nearer_to_dense_than_dropping() -> None:
    layout = block_layout(TokenGrid(3, 8, 16), block_size=16)
    generator = torch.Generator().manual_seed(0)
    # neighbouring tokens resemble each other, as in a video
    smooth = torch.randn(3, 1, layout.num_blocks, 2, 16, generator=generator).repeat_interleave(16, dim=2)
    tensors = list(smooth + 0.3 * torch.randn(smooth.shape, generator=generator))
    dense = sdpa(*tensors)
    errors = [
        (draft_attention(*tensors, layout, DraftConfig(block_size=16, residual=residual)) - dense).norm()
        for residual in (True, False)
    ]
    assert errors[0] < 0.6 * errors[1]


def test_bfloat16_comes_back_as_bfloat16() -> None:
    layout = block_layout(TokenGrid(2, 8, 8), block_size=16)
    tensors = [x.bfloat16() for x in random_qkv(layout.num_tokens)]
    output = draft_attention(*tensors, layout, DraftConfig(sparsity=0, block_size=16))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), sdpa(*(x.float() for x in tensors)), rtol=2e-2, atol=2e-2)


def test_a_sequence_that_does_not_fit_the_layout_is_refused() -> None:
    layout = block_layout(TokenGrid(2, 5, 7))
    query = torch.randn(1, 80, 2, 16)
    with pytest.raises(InputError, match=r"80 and key 80 tokens; the layout has 70"):
        draft_attention(query, query, query, layout)
    query = query[:, :70]
    with pytest.raises(InputError, match="no text tokens"):
        draft_attention(query, query, query, layout, text_lengths=torch.tensor([3]))
