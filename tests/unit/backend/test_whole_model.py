"""The whole model, run through each device's code on CPU tensors, equals itself on the definition."""

import json

import numpy as np
import pytest
import torch

import aquila.backend
from aquila.config import ModelConfig
from aquila.model import AquilaModel, KVCache

KINDS = ("fused", "triangle", "reference")


@pytest.fixture
def on_backend(backend, monkeypatch):
    """CPU tensors meet the backend under test."""
    monkeypatch.setitem(aquila.backend.devices._BACKENDS, "cpu", backend)


def small(kind, **options):
    config = ModelConfig(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=301,
        multiple_of=16,
        max_seq_len=128,
        checkpoint_activations=bool(options),
    )
    return AquilaModel(config, attention=kind, seed=5, **options)


def step(model, documents):
    tokens = torch.randint(301, (2, 90), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, labels=tokens.roll(-1, 1), documents=documents)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


def packed():
    documents = torch.zeros(2, 90, dtype=torch.int64)
    documents[0, 33:] = 1
    documents[1, 60:] = 1
    return documents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", [None, packed()], ids=["causal", "packed"])
@pytest.mark.parametrize("options", [{}, {"recompute": "full"}, {"recompute": "selective"}], ids=str)
def test_a_step_equals_the_definition(backend, monkeypatch, kind, documents, options):
    monkeypatch.setitem(aquila.backend.devices._BACKENDS, "cpu", aquila.backend.reference)
    wanted, wanted_gradients = step(small("reference"), documents)
    monkeypatch.setitem(aquila.backend.devices._BACKENDS, "cpu", backend)
    got, gradients = step(small(kind, **options), documents)
    assert got == pytest.approx(wanted, rel=1e-6)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_equals_the_whole(on_backend, kind):
    model = small(kind)
    tokens = torch.randint(301, (1, 40))
    cache = KVCache(model.config, 1, 40)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split([17, 1, 1, 21], dim=1)]
        assert (torch.cat(parts, dim=1) - model(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_golden_numbers_on_every_backend(on_backend, shared_dir, kind):
    folder = shared_dir / "data" / "golden" / "aquila-nano"
    arrays, figures = np.load(folder / "golden.npz"), json.loads((folder / "golden.json").read_text())
    model = AquilaModel.from_pretrained(folder, attention=kind)
    ids = torch.from_numpy(arrays["input_ids"])
    assert np.abs(model(ids).detach().numpy() - arrays["logits"]).max() < 1e-4
    loss = model(ids[:, :-1], labels=ids[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-6)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(figures["grad_norms"], rel=1e-4)
