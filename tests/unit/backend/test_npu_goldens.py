"""Protects: the stand-in kernels of torch_npu's operators mean what the vendor's own tests say they mean.

Ascend/op-plugin computes expected results on a CPU in test/test_custom_ops/ (test_npu_rotary_mul and its
backward, test_npu_cross_entropy_loss, test_npu_rms_norm and its backward, test_npu_swi_glu and its backward,
test_npu_flash_attention with packed lengths) and test/test_base_ops/test_scaled_masked_softmax; read at
commit 517f2e7d. What those say is written out here a second time, by number and pair where they use whole
tensors, in fp64; inputs are of this project's shapes.
"""

import math

import pytest
import torch
from torch import Tensor

from tests.npu_simulator import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative error of a result rounded once; the vendor's own bounds for half precision are wider."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    """`terms`: how many roundings of that size may add up."""
    assert found.dtype == dtype
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= terms * EPSILON[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_interleaved(dtype) -> None:
    """Number 2i becomes x[2i] cos - x[2i+1] sin, its neighbour x[2i+1] cos + x[2i] sin, each its angle."""
    x, slope = (random(2, 24, 5, 128, dtype=dtype, seed=s) for s in (0, 1))
    cos, sin = (random(1, 24, 1, 128, dtype=dtype, seed=s).clamp(-1, 1) for s in (2, 3))
    wanted, back = torch.empty(x.shape).double(), torch.empty(x.shape).double()
    X, C, S, G = (t.double() for t in (x, cos, sin, slope))
    for first in range(0, 128, 2):
        a, b = first, first + 1
        wanted[..., a] = X[..., a] * C[..., a] - X[..., b] * S[..., a]
        wanted[..., b] = X[..., b] * C[..., b] + X[..., a] * S[..., b]
        back[..., a] = G[..., a] * C[..., a] + G[..., b] * S[..., b]
        back[..., b] = G[..., b] * C[..., b] - G[..., a] * S[..., a]
    near(kernels.rotary_mul(x, cos, sin, "interleave"), wanted, dtype)
    dx, _, _ = kernels.rotary_mul_backward(slope, x, cos, sin, "interleave")
    near(dx, back, dtype, terms=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.088, -0.7])
def test_softmax_of_scaled_and_masked_scores(dtype, scale) -> None:
    """Hidden scores are -10000, not minus infinity: a row with nothing to see is even over all its keys."""
    x, slope = (random(2, 3, 64, 96, dtype=dtype, seed=s) * 5 for s in (0, 1))
    mask = random(2, 1, 64, 96, seed=2) > 0
    mask[0, 0, 7] = True
    scores = torch.where(mask, torch.tensor(-10000.0).double(), x.double() * scale)
    wanted = scores.sub(scores.amax(-1, keepdim=True)).exp()
    wanted /= wanted.sum(-1, keepdim=True)
    found = kernels.scaled_masked_softmax(x, mask, scale, False)
    near(found, wanted, dtype)
    near(found[0, :, 7], torch.full((3, 96), 1 / 96).double(), dtype)
    # d softmax / d score: y (slope - sum of slope y), times the scale, nothing for a hidden score.
    g = slope.double()
    back = wanted * (g - (g * wanted).sum(-1, keepdim=True)) * scale
    back = torch.where(mask, torch.zeros(()).double(), back)
    near(kernels.scaled_masked_softmax_backward(slope, found, mask, scale, False), back, dtype, terms=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(dtype, reduction) -> None:
    """Log-probabilities are x - max - log(sum of exp(x - max)) in fp32; a loss is the label's, negated."""
    x = (random(6, 100_008) * 4).to(dtype)
    labels = torch.tensor([0, 5, 100_007, 99_999, 3, 3])
    X = x.double()
    greatest = X.amax(1, keepdim=True)
    log_probabilities = X - greatest - (X - greatest).exp().sum(1, keepdim=True).log()
    each = torch.stack([-log_probabilities[row, label] for row, label in enumerate(labels)])
    wanted = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    loss, found, _, _ = kernels.cross_entropy_loss(x, labels, reduction=reduction)
    near(loss, wanted, dtype)
    near(found, log_probabilities, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype) -> None:
    """Through fp32; the second result is 1 / sqrt(mean of squares + epsilon), which backward takes."""
    x, slope = (random(3, 40, 256, dtype=dtype, seed=s) for s in (0, 1))
    gamma = random(256, dtype=dtype, seed=2)
    X, G, W = (t.double() for t in (x, slope, gamma))
    root = (X.square().sum(-1, keepdim=True) / 256 + 1e-6).sqrt()
    found, rstd = kernels.rms_norm(x, gamma, 1e-6)
    near(found, X / root * W, dtype)
    near(rstd, 1 / root, torch.float32)
    inner = (G * W * X).sum(-1, keepdim=True) / 256
    dx, dgamma = kernels.rms_norm_backward(slope, x, gamma, rstd)
    near(dx, G * W / root - X * inner / root**3, dtype, terms=2)
    near(dgamma, (G * X / root).sum((0, 1)), dtype, terms=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype) -> None:
    """The first half is the gate: a sigmoid(a) b, in fp32 and rounded once."""
    x, slope = random(4, 9, 2 * 344, dtype=dtype), random(4, 9, 344, dtype=dtype, seed=1)
    a, b, g = x[..., :344].double(), x[..., 344:].double(), slope.double()
    s = 1 / (1 + (-a).exp())
    near(kernels.swiglu(x), a * s * b, dtype)
    back = torch.cat((g * b * (s + a * s * (1 - s)), g * a * s), -1)
    near(kernels.swiglu_backward(slope, x), back, dtype, terms=2)


@pytest.mark.parametrize(("queries", "keys"), [((1, 2, 3), (3, 4, 5)), ((40, 1, 23), (40, 1, 23))])
def test_attention_of_packed_documents(queries, keys) -> None:
    """Each document by itself, unmasked; grouped heads; each softmax's greatest score and its sum."""
    heads, groups, size = 8, 2, 128
    q, slope = (random(sum(queries), heads, size, seed=s) for s in (0, 1))
    k, v = (random(sum(keys), groups, size, seed=s) for s in (2, 3))
    ends = [[sum(lengths[: n + 1]) for n in range(3)] for lengths in (queries, keys)]
    options = {"scale": size**-0.5, "actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1]}
    out, greatest, total, *_ = kernels.fusion_attention(q, k, v, heads, "TND", **options)
    assert greatest.shape == total.shape == (sum(queries), heads, 8)
    wanted, slopes = torch.zeros(q.shape).double(), [torch.zeros(t.shape).double() for t in (q, k, v)]
    statistics = torch.zeros(2, sum(queries), heads).double()
    Q, K, V, G = (t.double() for t in (q, k, v, slope))
    for first, end, key_first, key_end in zip([0, *ends[0]], ends[0], [0, *ends[1]], ends[1], strict=False):
        rows, cols = slice(first, end), slice(key_first, key_end)
        for head in range(heads):
            group = head // (heads // groups)
            scores = Q[rows, head] @ K[cols, group].T / math.sqrt(size)
            p = (scores - scores.amax(1, keepdim=True)).exp()
            statistics[:, rows, head] = torch.stack((scores.amax(1), p.sum(1)))
            p /= p.sum(1, keepdim=True)
            wanted[rows, head] = p @ V[cols, group]
            dp = G[rows, head] @ V[cols, group].T
            ds = p * (dp - (dp * p).sum(1, keepdim=True)) / math.sqrt(size)
            slopes[0][rows, head] = ds @ K[cols, group]
            slopes[1][cols, group] += ds.T @ Q[rows, head]
            slopes[2][cols, group] += p.T @ G[rows, head]
    near(out, wanted, torch.float32, terms=2)
    near(greatest, statistics[0, ..., None].expand(-1, -1, 8), torch.float32)
    near(total, statistics[1, ..., None].expand(-1, -1, 8), torch.float32)
    options["scale_value"] = options.pop("scale")
    found = kernels.fusion_attention_grad(q, k, v, slope, heads, "TND", **options)[:3]
    for mine, theirs in zip(found, slopes, strict=True):
        near(mine, theirs, torch.float32, terms=4)


def test_attention_without_documents_and_causal_in_the_last_rows() -> None:
    """sparse_mode 3: the last query sees all keys, each one before it one fewer."""
    q, k, v = random(1, 6, 2, 16), random(1, 9, 2, 16, seed=1), random(1, 9, 2, 16, seed=2)
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    out, *_ = kernels.fusion_attention(q, k, v, 2, "BSND", atten_mask=mask, scale=0.25, sparse_mode=3)
    for row in range(6):
        for head in range(2):
            scores = (k[0, : row + 4, head].double() @ q[0, row, head].double()) * 0.25
            wanted = scores.softmax(0) @ v[0, : row + 4, head].double()
            near(out[0, row, head], wanted, torch.float32)
