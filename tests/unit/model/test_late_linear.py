"""The product whose weight may be gone between forward and backward."""

import torch

from aquila.model.late_linear import LateLinear
from aquila.model.linear import Linear


def test_gradients_are_those_of_torch():
    x = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(6, 8))
    ours = torch.autograd.grad(LateLinear.apply(x, weight).square().sum(), (x, weight))
    torchs = torch.autograd.grad(torch.nn.functional.linear(x, weight).square().sum(), (x, weight))
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other)


def test_backward_takes_the_weight_that_is_there_then():
    """As ZeRO-3 does: the memory goes after forward, and other memory comes before backward."""
    layer = Linear(8, 6, bias=False)
    layer.late = True
    layer.weight.data = torch.randn(6, 8)
    x = torch.randn(5, 8, requires_grad=True)
    y = layer(x)
    later = torch.randn(6, 8)
    layer.weight.data = torch.empty(0)
    layer.weight.data = later
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.ones(5, 6) @ later)
