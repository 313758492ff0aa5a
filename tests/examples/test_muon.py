import pytest
import torch

from examples.tiny_wan.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 40, 16), (2, 16, 40)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
    assert singular.median() > 0.6
    assert singular.max() < 1.3


def test_directions_stay():
    torch.manual_seed(0)
    matrix = torch.randn(1, 8, 8)
    left, _, right = torch.linalg.svd(matrix)
    turned = left.mT @ orthogonalised(matrix) @ right.mT
    off_diagonal = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4


def test_batches_equal_single_matrices():
    torch.manual_seed(0)
    start = [torch.randn(6, 6), torch.randn(4, 8), torch.randn(6, 6), torch.randn(8, 4)]
    gradients = [torch.randn_like(weight) for weight in start]
    together = [weight.clone().requires_grad_() for weight in start]
    apart = [weight.clone().requires_grad_() for weight in start]
    optimizers = [Muon(together, 0.1, weight_decay=0.1), *(Muon([weight], 0.1, weight_decay=0.1) for weight in apart)]
    for _ in range(2):
        for group in (together, apart):
            for weight, gradient in zip(group, gradients, strict=True):
                weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for first, second in zip(together, apart, strict=True):
        torch.testing.assert_close(first, second)


def test_update_is_orthogonal_momentum():
    torch.manual_seed(0)
    start, gradient = torch.randn(5, 20), torch.randn(5, 20)
    weight = start.clone().requires_grad_()
    weight.grad = gradient.clone()
    Muon([weight], lr=0.5, momentum=0.9, weight_decay=0.2).step()
    ahead = gradient.lerp(0.1 * gradient, 0.9)
    expected = start * (1 - 0.5 * 0.2) - 0.5 * 0.2 * 20**0.5 * orthogonalised(ahead[None])[0]
    torch.testing.assert_close(weight.detach(), expected)
