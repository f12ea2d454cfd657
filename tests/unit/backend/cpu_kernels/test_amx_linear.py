"""Products on matrix tiles are the exact sums, rounded once; elsewhere torch makes them."""

import pytest
import torch

from aquila.backend.cpu_kernels.amx import linear as amx_linear

needs_tiles = pytest.mark.usefixtures("amx")


@needs_tiles
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(1, 5, 32), (2, 16, 32), (33, 64, 96), (512, 130, 64), (513, 127, 64), (1100, 77, 32)],
)
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_exact_sum(tokens, outputs, inputs, beta, dtype):
    g = torch.Generator().manual_seed(tokens)
    grad_output = torch.randn(tokens, outputs + 3, generator=g).bfloat16()[
        :, :outputs
    ]  # rows of a wider matrix
    x = torch.randn(tokens, inputs, generator=g).bfloat16()
    out = torch.randn(outputs, inputs, generator=g).to(dtype)
    exact = grad_output.double().T @ x.double() + beta * out.double()
    if not beta:
        out.fill_(float("nan"))  # whatever was there must not come in
    amx_linear.add(out, grad_output, x, beta)
    torch.testing.assert_close(
        out.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5 * tokens**0.5
    )


@pytest.mark.parametrize(
    ("dtype", "inputs"), [(torch.float32, 32), (torch.bfloat16, 20), (torch.bfloat16, 64)]
)
def test_a_linear_layer_has_torchs_gradients(dtype, inputs):
    g = torch.Generator().manual_seed(inputs)
    x = torch.randn(2, 40, inputs, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(24, inputs, generator=g).to(dtype).requires_grad_()
    grad_output = torch.randn(2, 40, 24, generator=g).to(dtype)
    got, wanted = amx_linear.linear(x, weight), torch.nn.functional.linear(x, weight)
    assert torch.equal(got, wanted)
    pairs = zip(*(torch.autograd.grad(y, (x, weight), grad_output) for y in (got, wanted)), strict=True)
    for ours, torchs in pairs:
        torch.testing.assert_close(ours, torchs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-1)


def test_a_frozen_weight_gets_none_and_passes_the_gradient_on():
    x = torch.randn(3, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32, 32, dtype=torch.bfloat16)
    amx_linear.linear(x, weight).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.float().sum(0).bfloat16().expand(3, -1), rtol=2e-2, atol=1e-1)


@needs_tiles
def test_a_nan_is_not_hidden():
    grad_output, x = torch.ones(40, 32, dtype=torch.bfloat16), torch.ones(40, 32, dtype=torch.bfloat16)
    grad_output[7, 3] = float("nan")
    out = torch.empty(32, 32, dtype=torch.bfloat16)
    amx_linear.add(out, grad_output, x, 0)
    assert out[3].isnan().all()
    assert out.isnan().sum() == 32
