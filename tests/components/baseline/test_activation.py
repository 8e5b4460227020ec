import pytest
import torch

from components.baseline import activation
from components.baseline.activation import activate


@pytest.mark.parametrize("slice_size", [1, 64, 1 << 17])  # one example at a time, a few, all
def test_slices_have_the_scores_and_gradients_of_plain_operations(slice_size, monkeypatch):
    monkeypatch.setattr(activation, "SLICE_SIZE", slice_size)
    torch.manual_seed(0)
    contexts = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    hidden, users, weights = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 5, 3), (7, 3), (7, 3))
    )
    gradient = torch.randn(7, 5, dtype=torch.float64)

    def differentiate(scores):
        return torch.autograd.grad(scores, (hidden, users, weights), gradient)

    plain = torch.einsum("ech,eh->ec", (hidden[contexts] + users.unsqueeze(1)).relu(), weights)
    sliced = activate(hidden, users, weights, contexts)
    torch.testing.assert_close(sliced, plain)
    for found, expected in zip(differentiate(sliced), differentiate(plain), strict=True):
        torch.testing.assert_close(found, expected)
