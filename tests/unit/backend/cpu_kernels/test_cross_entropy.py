"""The compiled loss and the blocked one equal the definition, and bad labels are refused."""

import pytest
import torch

from aquila.backend import reference
from aquila.backend.cpu_kernels import cross_entropy as cross_entropy_kernel


def _native(*arguments):
    losses = cross_entropy_kernel.cross_entropy_(*arguments)
    if losses is None:
        pytest.skip("no C++ compiler here")
    return losses


@pytest.mark.parametrize("way", [_native, cross_entropy_kernel.blocked], ids=["compiled", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("vocab", [1, 37, 5003])
def test_loss_and_gradient_are_those_of_fp64(way, dtype, gradient, vocab):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, vocab, generator=generator) * 8).to(dtype)
    labels = torch.randint(0, vocab, (9,), generator=generator)
    scale = torch.rand(9, generator=generator)
    expected_gradient = logits.double()
    expected = reference.cross_entropy_(expected_gradient, labels, scale.double(), 1e-3, gradient)
    losses = way(logits, labels, scale, 1e-3, gradient)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    rtol = 2**-8 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(logits.double(), expected_gradient, rtol=rtol, atol=1e-7)


def test_values_that_are_not_finite_are_not_hidden():
    for bad in (float("nan"), float("inf")):
        logits = torch.randn(2, 100)
        logits[1, 7] = bad
        losses = _native(logits, torch.tensor([3, 4]), torch.ones(2), 0.0, True)
        assert losses[0].isfinite()
        assert not losses[1].isfinite()
        assert not logits[1].isfinite().all()


def test_a_label_beyond_the_vocabulary_is_an_error_and_no_stray_read():
    for label in (-1, 100):
        with pytest.raises(IndexError, match="vocabulary of 100"):
            _native(torch.randn(1, 100), torch.tensor([label]), torch.ones(1), 0.0, True)
