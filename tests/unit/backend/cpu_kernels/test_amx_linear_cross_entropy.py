"""The loss on matrix tiles and its gradients are the definition's, as near as bf16 products allow."""

import pytest
import torch

from aquila.backend import reference
from aquila.backend.cpu_kernels.amx import linear_cross_entropy as amx_linear_cross_entropy

needs_tiles = pytest.mark.usefixtures("amx")


def inputs(tokens, vocab, dim, spread=0.3):
    g = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, dim, generator=g).bfloat16()
    weight = (spread * torch.randn(vocab, dim, generator=g)).bfloat16()
    labels = torch.randint(vocab, (tokens,), generator=g)
    return hidden, weight, labels, torch.rand(tokens, generator=g)


def truth(hidden, weight, labels, scale, z_loss):
    """Losses and gradients in fp64."""
    hidden, weight = hidden.double(), weight.double()
    logits = hidden @ weight.T
    losses = reference.cross_entropy_(logits, labels, scale.double(), z_loss)
    return losses, logits @ weight, logits.T @ hidden


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@needs_tiles
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(
    ("tokens", "vocab", "dim"),
    [(1, 1, 32), (5, 300, 32), (33, 1000, 64), (300, 2001, 96), (64, 515, 1056), (520, 256, 512)],
)
def test_it_is_the_definition(tokens, vocab, dim, z_loss, threads):
    given = inputs(tokens, vocab, dim)
    given[3][tokens // 2 :: 7] = 0  # masked tokens
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    losses, hidden, weight = amx_linear_cross_entropy.cross_entropy(*given, z_loss, (True, True))
    torch.set_num_threads(before)
    wanted = truth(*given, z_loss)
    torch.testing.assert_close(losses.double(), wanted[0], rtol=3e-6, atol=3e-6)
    assert error(hidden, wanted[1]) < 4e-3 or vocab == 1
    assert error(weight, wanted[2]) < 4e-3 or vocab == 1


@needs_tiles
def test_maxima_that_rise_from_block_to_block_are_followed():
    hidden, weight, labels, scale = inputs(40, 3000, 32)
    weight *= torch.linspace(0.01, 8, 3000)[:, None].bfloat16()  # the last largest, of several hundreds
    losses, *gradients = amx_linear_cross_entropy.cross_entropy(
        hidden, weight, labels, scale, 0.0, (True, True)
    )
    wanted = truth(hidden, weight, labels, scale, 0.0)
    torch.testing.assert_close(losses.double(), wanted[0], rtol=3e-6, atol=1e-5)
    assert [error(*pair) < 4e-3 for pair in zip(gradients, wanted[1:], strict=True)] == [True, True]


@needs_tiles
def test_neither_threads_nor_neighbours_nor_wanted_gradients_change_a_token():
    hidden, weight, labels, scale = inputs(200, 700, 64)
    whole = amx_linear_cross_entropy.cross_entropy(hidden, weight, labels, scale, 0.0, (True, True))
    some = amx_linear_cross_entropy.cross_entropy(
        hidden[:70], weight, labels[:70], scale[:70], 0.0, (True, False)
    )
    assert torch.equal(whole[0][:70], some[0])
    assert torch.equal(whole[1][:70], some[1])
    assert some[2] is None
    alone = amx_linear_cross_entropy.cross_entropy(hidden, weight, labels, scale, 0.0, (False, True))
    assert alone[1] is None
    assert torch.equal(whole[2], alone[2])
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    again = amx_linear_cross_entropy.cross_entropy(hidden, weight, labels, scale, 0.0, (True, True))
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))


@needs_tiles
def test_a_nan_is_not_hidden():
    hidden, weight, labels, scale = inputs(50, 600, 32)
    hidden[7, 3] = float("nan")
    losses, hidden_grad, weight_grad = amx_linear_cross_entropy.cross_entropy(
        hidden, weight, labels, scale, 0.0, (True, True)
    )
    assert losses.isnan().nonzero().tolist() == [[7]]
    assert hidden_grad[7].isnan().all()
    assert weight_grad.isnan().all()


@needs_tiles
def test_a_label_outside_of_the_vocabulary_is_refused():
    hidden, weight, labels, scale = inputs(5, 40, 32)
    labels[2] = 40
    with pytest.raises(IndexError, match="vocabulary of 40"):
        amx_linear_cross_entropy.cross_entropy(hidden, weight, labels, scale, 0.0, (True, True))


def test_other_dtypes_and_widths_are_left_to_chunks():
    hidden, weight, labels, scale = inputs(5, 40, 32)
    assert (
        amx_linear_cross_entropy.cross_entropy(
            hidden.float(), weight.float(), labels, scale, 0.0, (True, True)
        )
        is None
    )
    odd = inputs(5, 40, 20)
    assert amx_linear_cross_entropy.cross_entropy(*odd, 0.0, (True, True)) is None
