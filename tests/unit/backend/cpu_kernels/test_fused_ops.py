"""The compiled passes equal the definition in fp64, forward and backward, whatever shapes and threads."""

import pytest
import torch

from aquila.backend import cpu, reference
from aquila.backend.cpu_kernels import fused_ops

needs_passes = pytest.mark.skipif(not fused_ops.available(), reason="no C++ compiler on this machine")
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def check(function, definition, inputs, tolerance):
    """Values and gradients of `function` against those of `definition` in fp64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, wanted = function(*inputs), definition(*wide)
    assert got.dtype == inputs[0].dtype
    grad_output = draw(*got.shape, dtype=got.dtype, seed=9).detach()
    results = [got, *torch.autograd.grad(got, inputs, grad_output)]
    for ours, truth in zip(
        results, [wanted, *torch.autograd.grad(wanted, wide, grad_output.double())], strict=True
    ):
        assert ours.shape == truth.shape
        assert (ours.double() - truth).norm() <= tolerance * truth.norm() + 1e-9


def tolerance(dtype):
    return 5e-3 if dtype == torch.bfloat16 else 5e-7


@needs_passes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (3, 7, 32), (70, 100), (2, 33, 512)])
def test_norm(dtype, shape):
    inputs = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    check(
        lambda x, w: fused_ops.rms_norm(x, w, 1e-5),
        lambda x, w: reference.rms_norm(x, w, 1e-5),
        inputs,
        tolerance(dtype),
    )


@needs_passes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("tokens", "rows", "dim"), [((1,), 1, 5), ((3, 50), 7, 33), ((2, 20), 2000, 64)])
def test_embedding(dtype, threads, tokens, rows, dim):
    weight = draw(rows, dim, dtype=dtype)
    taken = torch.randint(rows, tokens, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    check(
        lambda w: fused_ops.embedding(taken, w),
        lambda w: reference.embedding(taken, w),
        [weight],
        tolerance(dtype),
    )
    torch.set_num_threads(before)


@needs_passes
def test_a_row_that_many_tokens_take_gets_their_exact_sum():
    weight = draw(3, 8, dtype=torch.bfloat16)
    fused_ops.embedding(torch.ones(5000, dtype=torch.int64), weight).sum().backward()
    assert weight.grad[1].tolist() == [4992.0] * 8  # 5000, rounded; added one by one bf16 stays at 256
    assert not weight.grad[0].any()
    assert not weight.grad[2].any()


@needs_passes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 33), (2, 100, 200)])
def test_gate(dtype, shape):
    inputs = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    check(fused_ops.swiglu, reference.swiglu, inputs, tolerance(dtype))


@needs_passes
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_at_the_ends(dtype):
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4], dtype=dtype, requires_grad=True)
    got = fused_ops.swiglu(gate, torch.ones_like(gate))
    assert torch.equal(got[3:], gate[3:])
    assert (got[:3].abs() < 1e-30).all()
    (grad_output,) = torch.autograd.grad(got.sum(), gate)
    assert torch.allclose(grad_output.float(), torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-6)


@needs_passes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("half", [1, 5, 32])
def test_rotary(dtype, rows, half):
    angles = torch.randn(rows, 9, half, generator=torch.Generator().manual_seed(2))
    cos, sin = angles.cos(), angles.sin()
    check(
        lambda x: fused_ops.rotary(x, cos, sin),
        lambda x: reference.rotary(x, cos.double(), sin.double()),
        [draw(2, 9, 3, 2 * half, dtype=dtype)],
        tolerance(dtype),
    )


@needs_passes
def test_inputs_that_do_not_lie_dense():
    x = draw(6, 32, dtype=torch.float32).detach()
    apart = torch.stack((x, -x), dim=1)[:, 0]
    weight = torch.ones(32)
    assert torch.equal(fused_ops.rms_norm(apart, weight, 1e-5), fused_ops.rms_norm(x, weight, 1e-5))
    assert torch.equal(fused_ops.swiglu(apart, apart), fused_ops.swiglu(x, x))
    heads = x.view(1, 6, 2, 16).transpose(1, 2)
    cos = torch.ones(1, 2, 8)
    assert torch.equal(fused_ops.rotary(heads, cos, 0 * cos), heads)


@needs_passes
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype):
    x, weight, grad_output = (
        draw(100, 64, dtype=dtype),
        draw(64, dtype=dtype),
        draw(100, 64, dtype=dtype, seed=3),
    )
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = fused_ops.rms_norm(x, weight, 1e-5)
            results.append((y, *torch.autograd.grad(y, (x, weight), grad_output)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_passes
def test_a_nan_is_not_hidden():
    x = torch.ones(2, 32)
    x[1, 3] = float("nan")
    assert fused_ops.rms_norm(x, torch.ones(32), 1e-5).isnan().sum() == 32
    assert fused_ops.swiglu(x, x).isnan().sum() == 1


def test_other_dtypes_are_left_to_the_definition():
    x = torch.ones(2, 32, dtype=torch.float64)
    assert fused_ops.rms_norm(x, x[0], 1e-5) is None
    assert fused_ops.swiglu(x, x) is None


@pytest.mark.parametrize("way", [reference, cpu], ids=["definition", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rate", "decay", "factor"), [(1e-2, 0.1, 0.3), (2e-4, 0.1, 1.0), (1e-3, 0.0, 0.77)])
def test_a_step_in_pieces_is_torchs_adamw_over_master_weights(way, dtype, rate, decay, factor):
    g = torch.Generator().manual_seed(0)
    weights = (0.02 * torch.randn(217, 31, generator=g)).to(dtype)
    expected = torch.nn.Parameter(weights.float().view(-1).clone())
    settings = {"lr": rate, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    optimizer = torch.optim.AdamW([expected], fused=True, **settings)
    master = expected.detach().clone()
    first, second, step = torch.zeros_like(master), torch.zeros_like(master), torch.zeros(())
    for _ in range(4):
        gradient = (1e-3 * torch.randn(217 * 31, generator=g)).to(dtype)
        kept = gradient.clone()
        expected.grad = gradient.float() * factor
        optimizer.step()
        step += 1
        for part in (slice(0, 4096), slice(4096, None)):
            block = weights.view(-1)[part], master[part], gradient[part], first[part], second[part]
            way.adamw([block], step, settings, factor)
        assert torch.equal(gradient, kept)
    assert torch.equal(master, expected.detach())
    assert torch.equal(weights.view(-1), expected.detach().to(dtype))
    state = optimizer.state[expected]
    assert torch.equal(first, state["exp_avg"])
    assert torch.equal(second, state["exp_avg_sq"])


@pytest.mark.parametrize("way", [reference, cpu], ids=["definition", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 1000, 1025, 3_000_001])
def test_the_sum_of_squares(way, dtype, count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    total = way.square_sum([x])
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, x.double().square().sum(), rtol=1e-6, atol=0)
    x[count // 2] = float("inf")
    assert not way.square_sum([x]).isfinite()
