"""Native Sparse Attention against its definition, written out query by query in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from draftattn.errors import InputError
from draftattn.kernels.block_mask import BlockMask
from draftattn.pipelines.llm.nsa_attention import nsa_attention
from draftattn.pipelines.llm.nsa_compressed_attention import attend_compressed, attend_in_rows, attend_in_strides
from draftattn.pipelines.llm.nsa_compression import (
    LinearCompression,
    count_compressed,
    make_compression,
    tokens_of,
    visible_compressed,
)
from draftattn.pipelines.llm.nsa_config import NSAConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAPER = NSAConfig(compression_block=8, compression_stride=4, block_size=16, num_selected=4, window=11)
CONFIGS = {
    "paper": PAPER,
    "mean": NSAConfig.mean_pooled(block_size=8, num_selected=4, window=5),
    "long": replace(PAPER, compression_block=12, block_size=8, initial_blocks=0, local_blocks=1, num_selected=2),
    "no choice": replace(PAPER, num_selected=3, window=1),
    "no window": replace(PAPER, window=0),
}
Draw = Callable[..., Tensor]


@pytest.fixture
def draw() -> Draw:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    return draw


def literal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    gates: Tensor,
    config: NSAConfig,
    chosen: list[set[int]] | None = None,
) -> Tensor:
    """The definition: one query of one key head at a time, in the precision of the inputs."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    group, scale = heads // kv_heads, head_dim**-0.5
    out = torch.zeros_like(query)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.T * scale).softmax(-1)
        return weights @ v, weights

    for b in range(batch):
        for i in range(num_queries):
            t = num_keys - num_queries + i
            starts = [c * config.compression_stride for c in range(compressed_key.shape[1])]
            count = sum(start + config.compression_block - 1 <= t for start in starts)
            for h in range(kv_heads):
                rows = slice(h * group, (h + 1) * group)
                q = query[b, i, rows]
                parts = [torch.zeros_like(q)]
                own = t // config.block_size
                scores = {j: 0.0 for j in range(own + 1)}
                if count:
                    parts[0], weights = attend(q, compressed_key[b, :count, h], compressed_value[b, :count, h])
                    for j in scores:
                        for c, first in enumerate(starts[:count]):
                            shared = min(first + config.compression_block, (j + 1) * config.block_size)
                            shared -= max(first, j * config.block_size)
                            scores[j] += max(0, shared) * weights[:, c].sum().item()
                always = {j for j in scores if j < config.initial_blocks or j > own - config.local_blocks}
                rest = sorted(scores.keys() - always, key=lambda j: (-scores[j], j))
                best = always | set(rest[: config.num_selected - len(always)])
                if chosen is not None:
                    chosen.append(best)
                tokens = [s for s in range(t + 1) if s // config.block_size in best]
                parts.append(attend(q, key[b, tokens, h], value[b, tokens, h])[0])
                near = slice(max(0, t - config.window + 1), t + 1)
                parts.append(attend(q, key[b, near, h], value[b, near, h])[0] if config.window else parts[0] * 0)
                gate = gates[b, i, rows]
                out[b, i, rows] = sum(gate[:, n, None] * part for n, part in enumerate(parts))
    return out


def lists(mask: BlockMask) -> list[set[int]]:
    """The blocks of each query and key head, in the order of `literal`."""
    counts, ids = mask.kv_num_blocks.transpose(1, 2).cpu(), mask.kv_indices.transpose(1, 2).cpu()
    return [set(row[:count].tolist()) for count, row in zip(counts.flatten().tolist(), ids.flatten(0, 2), strict=True)]


def inputs(
    draw: Draw, config: NSAConfig, num_queries: int, num_keys: int, heads: int, kv_heads: int, dim: int = 16
) -> tuple[Tensor, ...]:
    query, key, value = (2 * draw(2, n, h, dim) for n, h in ((num_queries, heads), *[(num_keys, kv_heads)] * 2))
    count = count_compressed(num_keys, config)
    compressed = (draw(2, count, kv_heads, dim) for _ in range(2))
    return query, key, value, *compressed, draw(2, num_queries, heads, 3).sigmoid()


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(53, 53), (7, 61), (1, 47), (5, 5)], ids=str)
def test_equals_its_definition(draw: Draw, name: str, num_queries: int, num_keys: int) -> None:
    config = CONFIGS[name]
    exact_inputs = inputs(draw, config, num_queries, num_keys, heads=4, kv_heads=2)
    chosen: list[set[int]] = []
    exact = literal(*exact_inputs, config, chosen)
    single = [x.float() for x in exact_inputs]
    output, mask = nsa_attention(*single, config)
    assert lists(mask) == chosen
    assert relative_error(output, exact) <= 2 * relative_error(literal(*single, config), exact) + 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_a_query_after_cached_keys_gets_what_it_gets_among_all(draw: Draw, name: str) -> None:
    config = CONFIGS[name]
    query, key, value, compressed_key, compressed_value, gates = inputs(draw, config, 61, 61, heads=2, kv_heads=2)
    whole, _ = nsa_attention(query, key, value, compressed_key, compressed_value, gates, config)
    for first, last in ((0, 20), (20, 59), (59, 60), (60, 61)):
        count, rows = count_compressed(last, config), slice(first, last)
        part, _ = nsa_attention(
            query[:, rows], key[:, :last], value[:, :last], compressed_key[:, :count], compressed_value[:, :count],
            gates[:, rows], config,
        )  # fmt: skip
        torch.testing.assert_close(part, whole[:, rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("first", "length"), [(0, 70), (3, 64), (13, 50), (16, 16), (41, 3)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_compressed_attention_by_strides_equals_by_rows(draw: Draw, name: str, first: int, length: int) -> None:
    config = CONFIGS[name]
    count = count_compressed(first + length, config)
    query, key, value = draw(2, length, 4, 16), draw(2, max(1, count), 2, 16), draw(2, max(1, count), 2, 16)
    visible = visible_compressed(first, length, config, DEVICE)
    rows = attend_in_rows(query, key, value, visible, 0.3)
    strides = attend_in_strides(query, key, value, first, config, 0.3)
    torch.testing.assert_close(strides[0], rows[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(strides[1].double(), rows[1], rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_differences(draw: Draw) -> None:
    config = replace(PAPER, compression_block=4, compression_stride=2, block_size=4, num_selected=3, window=3)
    arguments = inputs(draw, config, 13, 13, heads=2, kv_heads=1, dim=4)
    arguments = tuple(x[:1].detach().requires_grad_() for x in arguments)
    assert torch.autograd.gradcheck(lambda *x: nsa_attention(*x, config)[0], arguments, fast_mode=True)


def test_gradients_reach_the_compression(draw: Draw) -> None:
    config = replace(PAPER, compression_block=4, compression_stride=2)
    compression = LinearCompression(2, 4, config, offsets=True).to(DEVICE, torch.float64)
    names = [name for name, _ in compression.named_parameters()]
    assert names == ["weight", "offset"]
    x = draw(1, tokens_of(3, config), 2, 4).requires_grad_()
    parameters = [draw(*p.shape).requires_grad_() for p in compression.parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(compression, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_compression_of_a_block_is_its_sum(draw: Draw, name: str) -> None:
    config = CONFIGS[name]
    count = 5
    x = draw(2, tokens_of(count, config), 2, 6)
    for compression in make_compression(2, 6, config):
        compression.to(DEVICE, torch.float64)
        for parameter in compression.parameters():
            parameter.data = draw(*parameter.shape)
        blocks = [x[:, i * config.compression_stride :][:, : config.compression_block] for i in range(count)]
        if isinstance(compression, LinearCompression):
            offset = 0.0 if compression.offset is None else compression.offset.transpose(0, 1)
            exact = [torch.einsum("brhd,hrde->bhe", block + offset, compression.weight) for block in blocks]
        else:
            exact = [block.mean(1) for block in blocks]
        torch.testing.assert_close(compression(x), torch.stack(exact, 1))


def test_linear_compression_begins_as_the_mean(draw: Draw) -> None:
    x = draw(1, tokens_of(4, PAPER), 2, 8)
    key, value = make_compression(2, 8, PAPER)
    mean = x.unfold(1, PAPER.compression_block, PAPER.compression_stride).mean(-1)
    for compression in (key, value):
        torch.testing.assert_close(compression.to(DEVICE, torch.float64)(x), mean)


def test_without_compressed_keys_recent_ones_serve(draw: Draw) -> None:
    query = draw(1, 3, 2, 16)
    output, lse = attend_compressed(query, query[:, :0], query[:, :0], 0, PAPER, 1.0)
    assert not output.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(compression="max"), "choose linear or mean"),
        (dict(compression_stride=0), "at least 1"),
        (dict(compression_block=20), "compression_block is 20"),
        (dict(block_size=40), "block_size is 40"),
        (dict(block_size=144), "at most 128"),
        (dict(local_blocks=0), "local_blocks >= 1"),
        (dict(num_selected=2), "3 blocks that are always chosen"),
        (dict(window=-1), "window is -1"),
        (dict(gate_init=(1.0, 2.0)), "need 3"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_configs_that_are_none(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        NSAConfig(**options)
