"""Sinks merged with a window: kernel and reference against a loop that turns the keys, not the queries."""

import pytest
import torch

from draftattn.kernels.sink_merge import merge_sinks, merge_sinks_reference

SINK, WINDOW = 5, 7
# the first query: in its window, in padding, past all of it, and nothing but padding
FIRST_SINKS, POSITIONS = [2, 6, 0, 9], [9, -20, 12, -99]
TURNS = {"whole": (64, 32), "odd": (96, 48), "large": (128, 64), "part": (80, 16), "small": (20, 10)}


def make(dtype, device, head_dim=20, half=10, length=53, heads=6, kv_heads=2):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    batch, num_keys = len(POSITIONS), 11
    query = random(batch, heads, length, head_dim).transpose(1, 2)
    key, value = random(2, batch, kv_heads, num_keys, head_dim).transpose(2, 3)
    output, lse = random(batch, length, heads, head_dim), 2 * random(batch, length, heads).transpose(1, 2)
    for item, (first, position) in enumerate(zip(FIRST_SINKS, POSITIONS, strict=True)):
        used = max(0, min(SINK, position + length - 1 - WINDOW))
        for x in (key, value):  # whatever is no sink of any query
            x[item, :first] = x[item, first + used :] = torch.nan
        padding = max(0, min(length, -position))
        output[item, :padding], lse[item, :, :padding] = 0.0, -torch.inf
    # the fastest turns as if many thousands of positions had gone by
    frequencies = 10.0 ** torch.linspace(4, -4, half, dtype=torch.float64)
    places = torch.tensor([FIRST_SINKS, POSITIONS], dtype=torch.int32)
    tensors = [x.to(dtype).to(device) for x in (output, query, key, value)]
    return [tensors[0], lse.to(device), *tensors[1:], *places.to(device), frequencies.to(device)]


def turned_keys(keys, positions, frequencies):
    """``[S, H_kv, D]`` moved ahead by complex multiplication; the angle in float64."""
    half = len(frequencies)
    real = torch.float64 if keys.dtype == torch.float64 else torch.float32
    turn = torch.polar(torch.ones(half, dtype=torch.float64), (positions * frequencies) % (2 * torch.pi))
    pairs = torch.complex(keys[..., :half].to(real), keys[..., half : 2 * half].to(real))
    pairs = pairs * turn.to(pairs.dtype)
    return torch.cat([pairs.real, pairs.imag, keys[..., 2 * half :].to(real)], dim=-1)


def literal(output, lse, query, key, value, first_sinks, positions, frequencies, dtype, scale):
    output, query, key, value = (x.cpu().to(dtype) for x in (output, query, key, value))
    frequencies, result = frequencies.cpu(), output.clone()
    group = query.shape[2] // key.shape[2]
    for item, (first, start) in enumerate(zip(first_sinks.tolist(), positions.tolist(), strict=True)):
        for row in range(query.shape[1]):
            position = start + row
            count = min(SINK, position - WINDOW)
            if count < 1:
                continue
            moved = max(0, position - SINK - WINDOW) - max(0, start - SINK - WINDOW)
            keys = turned_keys(key[item, first : first + count], moved, frequencies).repeat_interleave(group, 1)
            values = value[item, first : first + count].to(keys.dtype).repeat_interleave(group, 1)
            scores = torch.einsum("hd,shd->hs", query[item, row].to(keys.dtype), keys) * scale
            weights = torch.cat([lse[item, :, row, None].cpu().to(keys.dtype), scores], 1).softmax(1)
            rows = torch.cat([output[item, row, :, None].to(keys.dtype), values.transpose(0, 1)], 1)
            result[item, row] = torch.einsum("hs,hsd->hd", weights, rows).to(dtype)
    return result


@pytest.fixture(params=["plain", "dispatched", "triton"])
def merge(request):
    if request.param == "plain":
        return merge_sinks_reference
    if request.param == "dispatched":
        return merge_sinks
    pytest.importorskip("triton")
    from draftattn.kernels import triton_sink_merge

    return triton_sink_merge.merge_sinks


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_a_loop_over_queries(merge, turns, dtype, device):
    if dtype == torch.bfloat16 and device == "cpu" and merge not in (merge_sinks, merge_sinks_reference):
        pytest.skip("Triton's interpreter cuts bf16 off instead of rounding it")
    case = make(dtype, device, *turns)
    truth, torchs = literal(*case, torch.float64, 0.3), literal(*case, dtype, 0.3)
    merged = merge(*case, sink=SINK, window=WINDOW, scale=0.3)
    assert merged.dtype == dtype
    error, allowed = (merged.cpu() - truth).norm(), 2 * (torchs - truth).norm()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    before_the_text = case[1] == -torch.inf
    assert before_the_text.any()
    assert not merged.transpose(1, 2)[before_the_text].any()


def test_rows_are_split_in_the_reference(device, monkeypatch):
    case = make(torch.float32, device)
    whole = merge_sinks_reference(*case, sink=SINK, window=WINDOW, scale=1.0)
    monkeypatch.setattr("draftattn.kernels.sink_merge._ROWS", 10)
    torch.testing.assert_close(merge_sinks_reference(*case, sink=SINK, window=WINDOW, scale=1.0), whole)


def test_any_strides(merge, device):
    output, lse, query, key, value, *places = make(torch.float32, device, 16, 8)
    wide = [torch.cat([x, x.flip(-1)], dim=-1) for x in (output, query, key, value)]
    expected = literal(output, lse, query, key, value, *places, torch.float64, 0.25)
    output, query, key, value = (x[..., :16] for x in wide)
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    merged = merge(output, lse, query, key, value, *places, sink=SINK, window=WINDOW, scale=0.25)
    torch.testing.assert_close(merged.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    every_other = torch.stack([query, query], dim=-1).flatten(-2)[..., ::2]
    again = merge(output, lse, every_other, key, value, *places, sink=SINK, window=WINDOW, scale=0.25)
    torch.testing.assert_close(again, merged)


def test_extreme_scores_and_no_window_at_all(merge, device):
    case = make(torch.float32, device)
    case[0], case[1] = torch.zeros_like(case[0]), torch.full_like(case[1], -torch.inf)
    case[2] = case[2] * 1000
    merged = merge(*case, sink=SINK, window=WINDOW, scale=1.0)
    alone = literal(*case, torch.float64, 1.0)
    # scores of thousands are rounded to some ten-thousandths
    torch.testing.assert_close(merged.double().cpu(), alone, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("length", [0, 1])
def test_few_queries(merge, length, device):
    case = make(torch.float32, device)
    case[:3] = case[0][:, :length], case[1][:, :, :length], case[2][:, :length]
    merged = merge(*case, sink=SINK, window=WINDOW, scale=0.3)
    torch.testing.assert_close(merged.double().cpu(), literal(*case, torch.float64, 0.3), rtol=1e-5, atol=1e-5)


def test_gradients(device):
    output, lse, query, key, value, *places = make(torch.float64, device, 4, 1, length=9, heads=2, kv_heads=1)
    lse = lse.double().clamp(min=-5)
    leaves = [x.nan_to_num(0.5).clone().requires_grad_() for x in (output, lse, query, key, value)]
    assert torch.autograd.gradcheck(lambda *x: merge_sinks(*x, *places, sink=2, window=3), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lse": torch.zeros(1, 8, 2)}, "do not fit to query"),
        ({"value": torch.zeros(1, 8, 2, 4)}, "do not fit together"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, r"must be \[1\]"),
        ({"frequencies": torch.ones(3, dtype=torch.float64)}, "2 r <= 4"),
        ({"frequencies": torch.ones(2)}, "must be float64"),
        ({"sink": 0}, "sink is 0"),
    ],
)
def test_refusals(change, message):
    x, ints = torch.zeros(1, 8, 2, 4), torch.zeros(1, dtype=torch.int32)
    call = {"output": x, "lse": torch.zeros(1, 2, 8), "query": x, "key": x[:, :, :1], "value": x[:, :, :1]}
    call |= {"first_sinks": ints, "positions": ints, "frequencies": torch.ones(2, dtype=torch.float64), "sink": 1}
    with pytest.raises(ValueError, match=message):
        merge_sinks(**call | change, window=2)
