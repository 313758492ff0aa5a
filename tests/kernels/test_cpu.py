import pytest
import torch

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def device():
    return "cpu"


def test_against_float64(case, judge):
    case = case.to(case.spec.dtype, "cpu")
    judge(case, *case.run("cpu"))


def test_without_lse(case, judge):
    case = case.to(case.spec.dtype, "cpu")
    judge(case, *case.run("cpu", return_lse=False))


@pytest.mark.parametrize("blocks", [1, 3, 1000], ids=lambda n: f"room-for-{n}-blocks")
def test_chunks_of_any_size(make_case, judge, monkeypatch, blocks):
    from draftattn.kernels import cpu

    case = make_case(query_blocks=(40, 64, 3, 64, 64, 20, 64, 9), heads=4, mask_heads=4, residual=True).to(
        torch.float32, "cpu"
    )
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", blocks * 2 * 64 * 32 * 4)
    judge(case, *case.run("cpu", return_lse=False))


def test_float64(make_case):
    case = make_case(query_blocks=(64, 37, 50), residual=True, causal=True).to(torch.float64, "cpu")
    for result, expected in zip(case.run("cpu"), case.run("reference"), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("return_lse", [False, True], ids=["fused", "with-lse"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradients(make_case, causal, return_lse):
    case = make_case(query_blocks=(64, 37, 0, 50), causal=causal, residual=True, heads=4, mask_heads=4)
    case = case.to(torch.float64, "cpu")
    gradients = []
    for backend in ("cpu", "reference"):
        inputs = [x.clone().requires_grad_() for x in (case.query, case.key, case.value, *case.residual)]
        copy = type(case)(case.spec, *inputs[:3], case.mask, type(case.residual)(*inputs[3:]))
        out, lse = copy.run(backend, return_lse=return_lse)
        loss = out.square().sum()
        if lse is not None:
            loss = loss + lse[lse > -torch.inf].sin().sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for gradient, expected in zip(*gradients, strict=True):
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("window", [64, 65, 66])
def test_windows_that_end_at_a_block(make_case, judge, window):
    options = dict(causal=True, window=window, density=2.0, empty_row=False)
    case = make_case(query_blocks=(64, 64, 64), **options).to(torch.float32, "cpu")
    judge(case, *case.run("cpu", return_lse=False))


def test_shifts_in_a_dense_mask(make_case, judge):
    case = make_case(query_blocks=(64, 37), causal=True, shifts="block", density=2.0, empty_row=False)
    case = case.to(torch.float32, "cpu")
    judge(case, *case.run("cpu", return_lse=False))
