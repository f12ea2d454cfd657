"""Every backend equals the definition, forward and backward, and the definition equals plain loops."""

import math

import pytest
import torch

from aquila.acceptance.optimizer import contract_error
from aquila.backend import detect, get_backend, reference

LENGTHS = (1, 2, 31, 512, 513, 1000)
KINDS = ("fused", "triangle", "reference")


def make(seq, heads=4, kv_heads=2, dim=16, start=0, rows=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(seq)
    shapes = ((seq, heads), (start + seq, kv_heads), (start + seq, kv_heads))
    return [torch.randn(rows, s, h, dim, generator=g).to(dtype).requires_grad_() for s, h in shapes]


def gradients(output, inputs):
    g = torch.Generator().manual_seed(5)
    return torch.autograd.grad(output, inputs, torch.randn(output.shape, generator=g).to(output.dtype))


def close(a, b, tolerance):
    return (a - b).abs().max().item() < tolerance


def test_the_definition_equals_plain_loops():
    q, k, v = (x.detach() for x in make(5, start=3))
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
    out = reference.attention(q, k, v, kind="reference", documents=documents, start=3)
    for b in range(2):
        for i in range(5):
            for h in range(4):
                seen = [t for t in range(3 + i + 1) if documents[b, t] == documents[b, 3 + i]]
                scores = [math.exp(float(q[b, i, h] @ k[b, t, h // 2]) / 4) for t in seen]
                wanted = sum(s * v[b, t, h // 2] for s, t in zip(scores, seen, strict=True)) / sum(scores)
                assert close(out[b, i, h], wanted, 1e-6)


@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_equals_the_definition(backend, kind, seq):
    inputs = make(seq)
    wanted = reference.attention(*inputs, kind="reference")
    got = backend.attention(*inputs, kind=kind)
    assert close(got, wanted, 1e-5)
    for a, b in zip(gradients(got, inputs), gradients(wanted, inputs), strict=True):
        assert close(a, b, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [32, 96])
def test_documents_stay_apart_in_every_kind(backend, kind, block):
    inputs = make(200)
    documents = torch.zeros(2, 200, dtype=torch.int64)
    documents[0, 70:] += 1
    documents[0, 71:] += 1
    documents[1, 130:] += 1
    got = backend.attention(*inputs, kind=kind, documents=documents, block=block)
    parts = [(0, 0, 70), (0, 70, 71), (0, 71, 200), (1, 0, 130), (1, 130, 200)]
    for row, first, end in parts:
        alone = [x[row : row + 1, first:end] for x in inputs]
        wanted = reference.attention(*alone, kind="reference")
        assert close(got[row : row + 1, first:end], wanted, 1e-5)
    grads = gradients(got, inputs)
    whole = gradients(reference.attention(*inputs, kind="reference", documents=documents), inputs)
    assert all(close(a, b, 2e-5) for a, b in zip(grads, whole, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "seq"), [(7, 1), (7, 5), (40, 64)])
def test_queries_behind_a_cache_see_their_past(backend, kind, start, seq):
    q, k, v = make(seq, start=start)
    documents = (torch.arange(start + seq) > 3).long().expand(2, -1)
    for masks in (None, documents):
        got = backend.attention(q, k, v, kind=kind, start=start, documents=masks)
        assert close(got, reference.attention(q, k, v, kind="reference", start=start, documents=masks), 1e-5)


def test_attention_names_what_does_not_fit(backend):
    q, k, v = make(4)
    with pytest.raises(ValueError, match="'flash' is not one of fused, triangle, reference"):
        backend.attention(q, k, v, kind="flash")
    with pytest.raises(ValueError, match="start"):
        backend.attention(q, k, v, kind="fused", start=2)
    with pytest.raises(ValueError, match="documents"):
        backend.attention(q, k, v, kind="fused", documents=torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("rows", [1, 2])
def test_rotary_equals_the_definition(backend, rows):
    x = make(9)[0]
    angles = torch.randn(rows, 9, 8)
    got, wanted = (b.rotary(x, angles.cos(), angles.sin()) for b in (backend, reference))
    assert close(got, wanted, 1e-6)
    assert close(gradients(got, [x])[0], gradients(wanted, [x])[0], 1e-6)


def test_rotary_turns_interleaved_pairs():
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    angles = torch.tensor([[[0.5, 0.25]]])
    got = reference.rotary(x, angles.cos(), angles.sin()).flatten()
    wanted = torch.tensor([math.cos(0.5), math.sin(0.5), -math.sin(0.25), math.cos(0.25)])
    assert close(got, wanted, 1e-6)


def test_norm_and_feed_forward_equal_the_definition(backend):
    x, weight = torch.randn(3, 7, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    got, wanted = (b.rms_norm(x, weight, 1e-5) for b in (backend, reference))
    assert close(got, wanted, 2e-6)
    for a, b in zip(gradients(got, [x, weight]), gradients(wanted, [x, weight]), strict=True):
        assert close(a, b, 1e-5)
    got, wanted = (b.swiglu(x[..., :16], x[..., 16:]) for b in (backend, reference))
    assert close(got, wanted, 1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_equals_autograd(backend, z_loss, dtype):
    logits = (4 * torch.randn(37, 1003)).to(dtype)
    labels, scale = torch.randint(0, 1003, (37,)), torch.rand(37)
    truth = logits.double().requires_grad_()
    lse = truth.logsumexp(1)
    wanted = lse - truth.gather(1, labels[:, None])[:, 0] + z_loss * lse.square()
    (wanted * scale).sum().backward()
    for gradient in (False, True):
        work = logits.clone()
        losses = backend.cross_entropy_(work, labels, scale, z_loss, gradient=gradient)
        assert losses.dtype == torch.float32
        assert close(losses, wanted, 1e-5)
        if gradient:
            assert close(work, truth.grad, 1e-6 if dtype == torch.float32 else 4e-3)
        else:
            assert torch.equal(work, logits)


SIGNATURE = """COMMUNICATION COMPILE_BLOCKS LOGITS_BYTES OVERLAP_COMM KEPT ENVIRONMENT_DEFAULTS
 SAVED_IN_SELECTIVE OPTIMIZERS adamw add_weight_gradient attention
attention_kind convert_to_fp8 cross_entropy_ device_count device_name embedding fp8_support kernels linear
memory_gib optimizer optimizer_kind peak_flops prepare_generation prepare_weight profiling rms_norm rotary
set_device square_sum step_linear supported_precisions swiglu swiglu_halves TAKES_PARTS
synchronize whole_cross_entropy know_documents placement"""


def test_each_backend_offers_the_whole_signature(backend):
    assert [name for name in SIGNATURE.split() if not hasattr(backend, name)] == []


def test_the_optimizer_is_adamw_and_others_are_refused(backend):
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    parameter.grad = torch.tensor([0.5])
    optimizer = backend.optimizer("torch", [parameter], 0.1, (0.9, 0.95), 1e-8, 0.1)
    optimizer.step()
    # First step of AdamW: the decay, then a step of lr in the gradient's direction.
    assert parameter.item() == pytest.approx(1 * (1 - 0.1 * 0.1) - 0.1, rel=1e-6)
    with pytest.raises(ValueError, match="there are"):
        backend.optimizer("apex", [parameter], 0.1, (0.9, 0.95), 1e-8, 0.1)


def test_a_sum_of_squares_does_not_depend_on_how_it_was_cut(backend):
    """Small beside large, in the training dtype; to fp32's last digit, with fp64 or without."""
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[::1000] *= 1000
    truth = x.double().square().sum().item()
    for pieces in ([x], x.split(100_003), x.split(700)):
        assert float(backend.square_sum(pieces)) == pytest.approx(truth, rel=1e-7)
    assert float(backend.square_sum([])) == 0
    x[5] = float("inf")
    assert not backend.square_sum([x]).isfinite()


def test_each_optimizer_keeps_the_contract(backend):
    """Two groups, stepped one at a time with gradients that change: masters equal AdamW in fp64."""
    here = getattr(backend, "optimizers_here", lambda: backend.OPTIMIZERS)()
    for kind in ("auto", *here):
        assert contract_error(backend, torch.device("cpu"), kind) < 1e-5


def test_this_machine_has_a_backend():
    backend = get_backend(detect())
    assert backend.device_count() >= 1
    assert backend.device_name()
    assert "fp32" in backend.supported_precisions()
    assert backend.memory_gib() > 0
    with pytest.raises(ValueError, match="no backend for device 'tpu'"):
        get_backend("tpu")


def test_peaks_are_told_by_the_longest_name_that_fits():
    cuda = get_backend("cuda")
    assert cuda.peak_flops_of("NVIDIA H200", torch.bfloat16) == 989e12
    assert cuda.peak_flops_of("NVIDIA H20", torch.bfloat16) == 148e12
    assert cuda.peak_flops_of("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert cuda.peak_flops_of("Tesla V100-SXM2", torch.bfloat16) is None
    assert cuda.peak_flops_of("Unheard-of", torch.bfloat16) is None


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_auto_picks_the_fused_kernel_and_what_is_asked_stays(device):
    assert get_backend(device).attention_kind("auto") == "fused"
    assert get_backend(device).attention_kind("triangle") == "triangle"
    assert get_backend(device).attention_kind("reference") == "reference"
