"""Our model against logits, loss, gradient norms and text of the original model code (fp32, CPU)."""

import json

import numpy as np
import pytest
import torch

from aquila.model import AquilaModel, KVCache

KINDS = ("fused", "triangle", "reference", "auto")


@pytest.fixture
def golden(shared_dir):
    folder = shared_dir / "data" / "golden" / "aquila-nano"
    arrays = np.load(folder / "golden.npz")
    figures = json.loads((folder / "golden.json").read_text())
    greedy = json.loads((folder / "greedy.json").read_text())
    return folder, arrays, figures, greedy


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_original(golden, kind):
    folder, arrays, _, _ = golden
    model = AquilaModel.from_pretrained(folder, attention=kind)
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays["input_ids"]))
    assert np.abs(logits.numpy() - arrays["logits"]).max() < 1e-4
    assert np.abs(logits[:, -1].numpy() - arrays["last_logits"]).max() < 1e-4


@pytest.mark.parametrize("checkpointing", ["none", "first", "all", "selective"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_original(golden, kind, checkpointing):
    folder, arrays, figures, _ = golden
    overrides = {
        "none": {},
        "first": {"checkpoint_activations": True, "ckpoint_layer": 1},
        "all": {"checkpoint_activations": True, "ckpoint_layer": -1},
        "selective": {"checkpoint_activations": True, "recompute": "selective"},
    }[checkpointing]
    model = AquilaModel.from_pretrained(folder, attention=kind, **overrides)
    ids = torch.from_numpy(arrays["input_ids"])
    loss = model(ids[:, :-1], labels=ids[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-6)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(figures["grad_norms"], rel=1e-4)
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total == pytest.approx(figures["total_grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [True, False])
def test_greedy_continuation_equals_the_original(golden, kind, cached):
    folder, _, _, greedy = golden
    model = AquilaModel.from_pretrained(folder, attention=kind)
    ids, wanted = list(greedy["prompt_ids"]), greedy["greedy_ids"]
    cache = KVCache(model.config, 1, len(wanted)) if cached else None
    fresh = ids
    with torch.no_grad():
        while len(ids) < len(wanted):
            logits = model(torch.tensor([fresh if cached else ids]), cache=cache)
            fresh = [logits[0, -1].argmax().item()]
            ids = ids + fresh
    assert ids == wanted
