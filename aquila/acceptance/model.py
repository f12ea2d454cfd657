"""Blocks as training runs them, and decoding, each against the plain definition."""

import time
from collections.abc import Callable
from types import ModuleType

import torch

from aquila.acceptance.operators import LIMITS, relative_error
from aquila.acceptance.table import Measured, Table
from aquila.config import ModelConfig
from aquila.generation.decode import generate
from aquila.model import AquilaModel

CONFIG = ModelConfig(
    dim=256, n_layers=12, n_heads=8, n_kv_heads=4, multiple_of=64, vocab_size=1217, max_seq_len=256
)
"""Twelve layers: more than the recompilations that torch.compile allows one piece of code."""


def check_model(table: Table, backend: ModuleType, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Loss and gradients of twelve layers, in each way that a run may take."""
    dtype = dtypes[0]
    ways = {
        "plain": {},
        "documents": {"documents": True},
        "recomputed": {"recompute": "full"},
        "recomputed, all but attention": {"recompute": "selective"},
    }
    for name, way in ways.items():
        table.check("model", name, _gradient_check(device, dtype, compiled=False, **way))
    if backend.COMPILE_BLOCKS:
        for name, way in ways.items():
            table.check("model", f"compiled, {name}", _gradient_check(device, dtype, compiled=True, **way))
        table.check("model", "graphs compiled", lambda: _graphs(device, dtype))
    table.check("generation", "cache against whole passes", lambda: _decoding(device), needs=("operators",))


def _inputs(documents: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(CONFIG.vocab_size, (2, 129), generator=g)
    numbers = (torch.rand(2, 128, generator=g) < 0.03).long().cumsum(1) if documents else None
    return tokens[:, :-1], tokens[:, 1:], numbers


def _gradient_check(
    device: torch.device, dtype: torch.dtype, *, compiled: bool, documents: bool = False, recompute: str = ""
) -> Callable[[], Measured]:
    def measure() -> Measured:
        tokens, labels, numbers = _inputs(documents)
        config = CONFIG
        if recompute:
            config = config.model_copy(update={"checkpoint_activations": True, "ckpoint_layer": 6})
        model = AquilaModel(config, recompute=recompute or "full", device=device, dtype=dtype, seed=1)
        truth = AquilaModel(CONFIG, attention="reference", dtype=torch.float32, seed=1)
        for mine, theirs in zip(truth.parameters(), model.parameters(), strict=True):
            mine.data.copy_(theirs.detach().float())
        if compiled:
            model.compile_blocks()
        on_device = [None if x is None else x.to(device) for x in (tokens, labels, numbers)]
        loss = model(on_device[0], labels=on_device[1], documents=on_device[2])
        loss.backward()
        wanted = truth(tokens, labels=labels, documents=numbers)
        wanted.backward()
        errors = [
            relative_error(p.grad, w.grad)
            for p, w in zip(model.parameters(), truth.parameters(), strict=True)
        ]
        detail = f"loss {loss.item():.5f}, definition {wanted.item():.5f}"
        return Measured(max(errors), 5 * LIMITS[dtype], detail=detail)

    return measure


def _graphs(device: torch.device, dtype: torch.dtype) -> Measured:
    """All twelve layers share one compiled graph in training; a second one is for evaluation."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = AquilaModel(CONFIG, device=device, dtype=dtype)
    model.compile_blocks()
    tokens = _inputs(False)[0].to(device)
    for _ in range(2):
        model.hidden(tokens).float().sum().backward()
    with torch.no_grad():
        model.hidden(tokens)
    breaks = sum(counters["graph_break"].values())
    graphs = counters["stats"]["unique_graphs"]
    return Measured(graphs + breaks, 2, "graphs", detail=f"{breaks} graph breaks")


def _decoding(device: torch.device) -> Measured:
    """Greedy tokens with the cache equal those of whole passes, in fp32; and how long one takes."""
    model = AquilaModel(CONFIG, device=device, dtype=torch.float32, seed=3).eval()
    prompt, count = _inputs(False)[0][0, :20].tolist(), 24
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([expected], device=device))[0, -1]
            expected.append(int(logits.argmax()))
    (found,) = generate(model, [prompt], count, temperature=0.0)
    started = time.perf_counter()
    generate(model, [prompt], count, temperature=0.0)
    each = 1000 * (time.perf_counter() - started) / count
    wrong = sum(a != b for a, b in zip(found, expected[len(prompt) :], strict=False)) + abs(
        len(found) - count
    )
    return Measured(wrong, 0, "tokens", detail=f"{each:.1f} ms a token at the second go")
