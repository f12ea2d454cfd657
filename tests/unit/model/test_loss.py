"""The chunked loss equals the plain one, in value and gradients, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F

from aquila.model.loss import chunk_tokens, cross_entropy

TOKENS, DIM, VOCAB = 50, 24, 333


def inputs(dtype=torch.float32, vocab=VOCAB, tokens=TOKENS, spread=1.0):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, DIM, generator=g).to(dtype).requires_grad_()
    weight = (spread * torch.randn(vocab, DIM, generator=g)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (tokens,), generator=g)


def plain(hidden, weight, labels, mask=None, z_loss=0.0):
    logits = hidden @ weight.t()
    mask = torch.ones(labels.shape, dtype=logits.dtype) if mask is None else mask.to(logits.dtype)
    losses = F.cross_entropy(logits, labels, reduction="none") + z_loss * logits.logsumexp(-1).square()
    return (losses * mask).sum() / mask.sum()


def truth(hidden, weight, *args, **kwargs):
    """Loss and gradients in fp64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = plain(h, w, *args, **kwargs)
    return loss.item(), *torch.autograd.grad(loss, (h, w))


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 64])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_value_and_gradients_equal_the_plain_loss(chunk, z_loss):
    hidden, weight, labels = inputs()
    mask = (torch.arange(TOKENS) % 3 > 0).float()
    loss = cross_entropy(hidden, weight, labels, mask, z_loss=z_loss, chunk=chunk)
    loss.backward()
    wanted, hidden_grad, weight_grad = truth(hidden, weight, labels, mask, z_loss)
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert error(hidden.grad, hidden_grad) < 1e-6
    assert error(weight.grad, weight_grad) < 1e-6


def test_the_upstream_gradient_scales_once():
    hidden, weight, labels = inputs()
    (cross_entropy(hidden, weight, labels, chunk=20) * 0.125).backward()
    _, hidden_grad, weight_grad = truth(hidden, weight, labels)
    assert error(hidden.grad, hidden_grad / 8) < 1e-6
    assert error(weight.grad, weight_grad / 8) < 1e-6


def test_masked_labels_may_be_anything_and_no_token_counts_nothing():
    hidden, weight, labels = inputs()
    mask = torch.ones(TOKENS)
    mask[10:] = 0
    wanted = cross_entropy(hidden[:10], weight, labels[:10])
    labels[10:], labels[11:] = -100, VOCAB + 7
    assert cross_entropy(hidden, weight, labels, mask, chunk=8).item() == pytest.approx(
        wanted.item(), rel=1e-6
    )
    nothing = cross_entropy(hidden, weight, labels, torch.zeros(TOKENS), chunk=8)
    nothing.backward()
    assert nothing.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_evaluation_computes_no_gradients(memory_meter):
    hidden, weight, labels = inputs()
    with torch.no_grad(), memory_meter() as meter:
        loss = cross_entropy(hidden, weight, labels, chunk=5)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(truth(hidden, weight, labels)[0], rel=1e-6)
    assert meter.peak < weight.numel() * 4


def test_frozen_weights_and_frozen_hidden_states_get_no_gradient():
    hidden, weight, labels = inputs()
    cross_entropy(hidden, weight.detach(), labels).backward()
    assert error(hidden.grad, truth(hidden, weight, labels)[1]) < 1e-6
    cross_entropy(hidden.detach(), weight, labels).backward()
    assert error(weight.grad, truth(hidden, weight, labels)[2]) < 1e-6


@pytest.mark.parametrize("chunk", [7, 20, 50])
def test_bf16_is_as_near_to_the_truth_as_the_plain_way_in_bf16(chunk):
    hidden, weight, labels = inputs(torch.bfloat16)
    loss = cross_entropy(hidden, weight, labels, chunk=chunk)
    assert loss.dtype == torch.float32
    loss.backward()
    wanted, hidden_grad, weight_grad = truth(hidden, weight, labels)
    theirs = plain(hidden, weight, labels)
    plain_hidden, plain_weight = torch.autograd.grad(theirs, (hidden, weight))
    assert abs(loss.item() - wanted) <= abs(theirs.item() - wanted) + 1e-3 * wanted
    assert error(hidden.grad, hidden_grad) <= 1.1 * error(plain_hidden, hidden_grad)
    # Summed in place, the gradient is rounded once a chunk, up to `MAX_ROUNDINGS` of them.
    assert error(weight.grad, weight_grad) <= 1.3 * error(plain_weight, weight_grad)


def test_many_chunks_do_not_round_the_bf16_weight_gradient_many_times():
    hidden, weight, labels = inputs(torch.bfloat16, vocab=40, tokens=800)
    cross_entropy(hidden, weight, labels, chunk=10).backward()
    wanted = truth(hidden, weight, labels)[2]
    (theirs,) = torch.autograd.grad(plain(hidden, weight, labels), weight)
    assert error(weight.grad, wanted) <= 1.1 * error(theirs, wanted)


def test_fp16_gradients_survive_small_probabilities_under_a_loss_scale():
    hidden, weight, labels = inputs(torch.float16, vocab=20000, spread=0.1)
    scale = 2.0**14
    (cross_entropy(hidden, weight, labels, chunk=16) * scale).backward()
    _, hidden_grad, weight_grad = truth(hidden, weight, labels)
    assert hidden.grad.dtype == torch.float16
    assert error(hidden.grad, scale * hidden_grad) < 2e-3
    assert error(weight.grad, scale * weight_grad) < 2e-3
    # A token's probability is 1/20000, its share of the mean 1e-6: without care fp16 holds it as zero.
    unlikely = torch.ones(20000, dtype=torch.bool)
    unlikely[labels] = False
    assert error(weight.grad[unlikely], scale * weight_grad[unlikely]) < 1e-2


def test_memory_at_the_real_vocabulary_is_under_a_tenth(memory_meter):
    tokens, vocab, dim = 2 * 2048, 100008, 8

    def peak(loss_function):
        hidden = torch.randn(tokens, dim, requires_grad=True)
        weight = torch.randn(vocab, dim, requires_grad=True)
        labels = torch.randint(vocab, (tokens,))
        with memory_meter() as meter:
            loss_function(hidden, weight, labels).backward()
        return meter.peak

    ours = peak(cross_entropy)
    # The plain way holds logits, log-probabilities and their gradient at once; counted, not run: 4.9 GB.
    whole = 3 * 4 * tokens * vocab
    assert ours < 0.1 * whole


def test_chunks_are_even_and_bounded():
    assert chunk_tokens(2048, 100008, torch.bfloat16) == 1024
    assert chunk_tokens(4096, 100008, torch.float32) * 100008 * 4 <= 150 << 20
    assert chunk_tokens(10, 500, torch.float32) == 10
    for tokens in (1, 1023, 1025, 5000):
        chunk = chunk_tokens(tokens, 100008, torch.bfloat16)
        assert -(-tokens // chunk) * chunk - tokens < -(-tokens // chunk)


def test_shapes_that_do_not_belong_together_are_named():
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match="50 hidden states, 49 labels"):
        cross_entropy(hidden, weight, labels[1:])


@pytest.mark.usefixtures("amx")
def test_a_kernel_for_the_whole_of_it_is_used_and_holds_no_logits(memory_meter):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 32, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(8000, 32, generator=g).bfloat16().requires_grad_()
    labels = torch.randint(8000, (512,), generator=g)
    with memory_meter() as meter:
        loss = cross_entropy(hidden, weight, labels)
        loss.backward()
    assert meter.peak < 512 * 8000  # half of the logits
    wanted, hidden_grad, weight_grad = truth(hidden, weight, labels)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert error(hidden.grad, hidden_grad) < 4e-3
    assert error(weight.grad, weight_grad) < 4e-3
