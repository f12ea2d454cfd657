"""The package against an independent fp64 Aquila: odd shapes, every attention kind, length and backend."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aquila.config import ModelConfig
from aquila.model import AquilaModel

sys.path.insert(0, str(Path(__file__).parent))
import plain_aquila

SHAPES = {
    "grouped": {"dim": 72, "n_heads": 6, "n_kv_heads": 2, "rope_theta": 1e6},
    "one key head": {"dim": 40, "n_heads": 5, "n_kv_heads": 1, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-3},
    "one head": {"dim": 34, "n_heads": 1, "hidden_dim": 7},
    "plain": {"dim": 64, "n_heads": 8},
}
KINDS = ("fused", "triangle", "reference")
LENGTHS = (1, 2, 31, 512, 513, 1000)


def make(shape, dtype=torch.float32, **options):
    config = ModelConfig(
        **SHAPES[shape], n_layers=2, multiple_of=8, vocab_size=307, max_seq_len=1024, initializer_range=0.2
    )
    model = AquilaModel(config, seed=11, **options)
    with torch.no_grad():  # norms of one would hide a forgotten weight
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                spread = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.copy_(0.5 + spread)
    return model.to(dtype)


def truth(model, tokens):
    config = model.config
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    return plain_aquila.logits(
        tokens,
        weights,
        n_layers=config.n_layers,
        heads=config.n_heads,
        kv_heads=config.kv_heads,
        theta=config.rope_theta,
        eps=config.norm_eps,
    )


def tokens_of(seq):
    return np.random.default_rng(seq).integers(0, 307, seq)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seq", [1, 2, 31, 130])
def test_fp64_equals_the_formulas(shape, seq):
    model, tokens = make(shape, torch.float64, attention="reference"), tokens_of(seq)
    got = model(torch.from_numpy(tokens)[None])[0].detach().numpy()
    # The angles are fp32 by definition, so that much remains.
    assert np.abs(got - truth(model, tokens)).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seq", LENGTHS)
def test_fp32_logits_and_loss_equal_the_formulas(shape, seq, kind):
    model, tokens = make(shape, attention=kind), tokens_of(seq)
    row = torch.from_numpy(tokens)[None]
    labels = np.roll(tokens, 1)
    with torch.no_grad():
        got, loss = model(row)[0].numpy(), model(row, labels=torch.from_numpy(labels)[None]).item()
    wanted = truth(model, tokens)
    # Logits reach 40 here: fp32 angles at position 1000 and fp32 sums leave some 1e-5 of that.
    assert np.abs(got - wanted).max() < 5e-4
    assert loss == pytest.approx(plain_aquila.loss(wanted, labels), rel=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seq", LENGTHS)
def test_attention_kinds_agree_pairwise(shape, seq):
    row = torch.from_numpy(tokens_of(seq))[None]
    with torch.no_grad():
        results = [make(shape, attention=kind)(row) for kind in KINDS]
    scale = results[0].abs().max().clamp(min=1.0)
    for a in range(3):
        for b in range(a):
            assert (results[a] - results[b]).abs().max() < 1e-5 * scale


def rms(x):
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("kind", ["fused", "triangle"])
@pytest.mark.parametrize("shape", ["grouped", "plain"])
def test_bf16_is_as_near_to_fp64_as_the_reference_in_bf16(shape, kind):
    row = torch.from_numpy(np.stack([tokens_of(300), tokens_of(300)[::-1]]).copy())

    def run(attention, dtype):
        model = make(shape, torch.bfloat16, attention=attention).to(dtype)  # the same rounded weights
        loss = model(row, labels=row.roll(1, 1))
        loss.backward()
        gradients = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        return model(row).detach().double(), loss.item(), gradients

    logits, loss, gradients = run("reference", torch.float64)
    ours, reference = run(kind, torch.bfloat16), run("reference", torch.bfloat16)
    assert rms(ours[0] - logits) <= 1.1 * rms(reference[0] - logits)
    assert abs(ours[1] - loss) <= 2 * abs(reference[1] - loss) + 1e-3 * loss
    assert rms(ours[2] - gradients) <= 1.1 * rms(reference[2] - gradients)
