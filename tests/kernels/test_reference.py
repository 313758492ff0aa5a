"""The reference is itself checked against a float64 softmax written out row by row."""

import math

import pytest
import torch


def literal_attention(case):
    spec, mask = case.spec, case.mask
    query, key, value = (x.double().cpu() for x in (case.query, case.key, case.value))
    batch, query_length, heads, head_dim = query.shape
    key_length, group = key.shape[1], heads // key.shape[2]
    scale = head_dim**-0.5 if spec.scale is None else spec.scale
    out = torch.zeros_like(query)
    lse = torch.full((batch, heads, query_length), -torch.inf, dtype=torch.float64)
    boundaries = mask.query_offsets.tolist()
    for b in range(batch):
        key_offsets = (mask.key_offsets[b] if mask.key_offsets.ndim == 2 else mask.key_offsets).tolist()
        for h in range(heads):
            for i in range(mask.num_query_blocks):
                mask_head = h * mask.kv_num_blocks.shape[1] // heads
                mask_index = (min(b, mask.kv_num_blocks.shape[0] - 1), mask_head, i)
                chosen = mask.kv_indices[mask_index][: mask.kv_num_blocks[mask_index]].tolist()
                whole = chosen
                if mask.window is not None:
                    flags = mask.window.whole
                    whole = [] if flags is None else [n for n, f in zip(chosen, flags[mask_index], strict=False) if f]
                for row in range(boundaries[i], boundaries[i + 1]):
                    position = row + case.shift_of(b, i)
                    last = position if spec.causal else key_length
                    columns = [
                        j
                        for n in chosen
                        for j in range(key_offsets[n], key_offsets[n + 1])
                        if j <= last
                        and (
                            mask.window is None
                            or n in whole
                            or j > position - spec.window
                            or j < case.start_of(b, i) + spec.sink
                        )
                    ]
                    keys, values = key[b, columns, h // group], value[b, columns, h // group]
                    scores = keys @ query[b, row, h] * scale
                    if case.residual is not None:
                        skipped = [
                            n
                            for n in range(mask.num_key_blocks)
                            if n not in chosen
                            and key_offsets[n + 1] > key_offsets[n]
                            and key_offsets[n + 1] - 1 <= last
                        ]
                        means, mean_values = (x.double().cpu()[b, skipped, h // group] for x in case.residual)
                        counts = torch.tensor([key_offsets[n + 1] - key_offsets[n] for n in skipped]).double()
                        scores = torch.cat([scores, means @ query[b, row, h] * scale + counts.log()])
                        values = torch.cat([values, mean_values])
                    if len(scores):
                        weights = (scores - scores.max()).exp()
                        out[b, row, h] = weights @ values / weights.sum()
                        lse[b, h, row] = scores.max() + math.log(weights.sum())
    return out, lse


def test_against_a_literal_softmax(case):
    expected, expected_lse = literal_attention(case)
    # the cases hold NaN outside the blocks, which must not spread
    out, lse = case.to(torch.float64, "cpu").run("reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.float())


def test_low_precision_is_computed_in_float32(make_case, judge):
    case = make_case(query_blocks=(37, 64), dtype=torch.bfloat16, residual=True)
    out, lse = case.run("reference")
    assert lse.dtype == torch.float32
    judge(case, out, lse)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_gradient_by_differences(make_case, residual):
    case = make_case(query_blocks=(3, 0, 2), block_size=4, head_dim=2, causal=True, residual=residual)
    case = case.to(torch.float64, "cpu")

    def attend(query, key, value, *means):
        residual = type(case.residual)(*means) if means else None
        return type(case)(case.spec, query, key, value, case.mask, residual).run("reference")[0]

    inputs = [x.requires_grad_() for x in (case.query, case.key, case.value, *(case.residual or ()))]
    assert torch.autograd.gradcheck(attend, inputs)


def test_gradients_ignore_what_lies_outside_the_blocks(make_case):
    case = make_case(query_blocks=(37, 64), uncovered=(3, 7), residual=True)
    inputs = [x.requires_grad_() for x in (case.query, case.key, case.value)]
    assert inputs[0][:, :3].isnan().all()
    case.run("reference")[0].square().sum().backward()
    for x in inputs:
        assert x.grad.isfinite().all()
        assert not x.grad[:, :3].any()
        assert not x.grad[:, -7:].any()


def test_all_blocks_chosen_is_dense_attention(make_case):
    case = make_case(query_blocks=(64, 37), density=2.0, empty_row=False)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (case.query, case.key, case.value))
    )
    torch.testing.assert_close(case.run("reference", return_lse=False)[0], dense.transpose(1, 2))


def test_residual_of_constant_blocks_is_dense_attention(make_case):
    """Where a block's keys and values are all alike, its mean with its weight stands for it exactly."""
    case = make_case(query_blocks=(64, 37, 20), density=0.4, residual=True)
    lengths = case.mask.key_offsets.diff().long()
    key, value = (means.repeat_interleave(lengths, dim=1) for means in case.residual)
    sparse = type(case)(case.spec, case.query, key, value, case.mask, case.residual).run("reference", return_lse=False)[
        0
    ]
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (case.query, key, value)))
    torch.testing.assert_close(sparse, dense.transpose(1, 2), rtol=1e-5, atol=1e-6)
