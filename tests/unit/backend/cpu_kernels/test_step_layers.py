"""All layers of a generation step as one call: bit for bit what layer after layer gives, at every level."""

import pytest
import torch

from aquila.backend import reference
from aquila.backend.cpu_kernels import gemv, step_layers
from aquila.config import ModelConfig
from aquila.generation.cache import RowCache
from aquila.generation.decode_step import DecodeStep
from aquila.generation.int8 import quantize
from aquila.model import AquilaModel
from tests.unit.backend.cpu_kernels.levels import LEVELS, run_at_level

needs_kernel = pytest.mark.skipif(not step_layers.available(), reason="no C++ compiler on this machine")
KINDS = {"bf16": torch.bfloat16, "int8": torch.bfloat16, "int8 of fp32": torch.float32}


def case(kind, lengths, **changes):
    values = {"dim": 96, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 300, "multiple_of": 24}
    config = ModelConfig(**{**values, "max_seq_len": 1024, "initializer_range": 0.15, **changes})
    model = AquilaModel(config, dtype=KINDS[kind], seed=7).requires_grad_(False)
    if kind.startswith("int8"):
        quantize(model)
    cache = RowCache(config, len(lengths) + 1, max(lengths) + 2, torch.device("cpu"), KINDS[kind])
    generator = torch.Generator().manual_seed(len(lengths))
    cache.kv.copy_(torch.randn(cache.kv.shape, generator=generator))
    return DecodeStep(model), cache, torch.arange(len(lengths)) * 7


def outcome(step, cache, tokens, lengths, layers):
    """Logits and the cache after one step whose layers `layers` computes (None: one after the other)."""
    before, step._layers = cache.kv.clone(), layers
    cache.lengths = list(lengths)
    logits, after = step(tokens, cache), cache.kv.clone()
    cache.kv.copy_(before)
    return logits, after


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lengths", [(3,), (0, 9), (300, 5, 256), (7,) * 5, (40, 2, 600, 1, 0, 9, 9, 3)], ids=len
)
@pytest.mark.parametrize(
    "changes", [{}, {"dim": 64, "n_heads": 2, "n_kv_heads": 2, "multiple_of": 8}], ids=str
)
def test_equals_the_layers_one_after_the_other(kind, lengths, changes):
    step, cache, tokens = case(kind, lengths, **changes)
    whole = step._layers
    assert gemv._tile_rows() or taken(whole, step, cache, lengths)
    wanted = outcome(step, cache, tokens, lengths, None)
    # In fp32 nothing stands between an int8 sum's scale and what it is added to: a compiler may round once.
    near = 1e-5 if KINDS[kind] == torch.float32 else 0.0
    for got, expected in zip(outcome(step, cache, tokens, lengths, whole), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=near, atol=near)


def taken(whole, step, cache, lengths):
    """Whether the kernel takes these rows, so that the test does not compare the layers with themselves."""
    rows = step._rows(list(lengths), torch.device("cpu"))
    kv = cache.kv.clone()[:, : len(lengths)]
    with torch.inference_mode():
        return whole(step.model.tok_embeddings.weight[: len(lengths)], kv, rows) is not None


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind):
    lengths = (5, 300, 0)
    step, cache, tokens = case(kind, lengths)
    whole = step._layers
    got, kv = outcome(step, cache, tokens, lengths, whole)

    def plainly(x, kv, rows):
        return reference.step_layers(x, whole.layers, kv, rows)

    wanted, stored = outcome(step, cache, tokens, lengths, plainly)
    near = {"rtol": 1e-4, "atol": 1e-4} if KINDS[kind] == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(got, wanted, **near)
    torch.testing.assert_close(kv, stored, **near)


@needs_kernel
def test_threads_change_nothing():
    lengths = (300, 5, 256)
    step, cache, tokens = case("bf16", lengths)
    wanted, _ = outcome(step, cache, tokens, lengths, step._layers)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(outcome(step, cache, tokens, lengths, step._layers)[0], wanted)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_what_the_kernel_does_not_take_goes_layer_by_layer():
    step, cache, tokens = case("bf16", (3,) * 9)  # more rows than a pass serves
    assert not taken(step._layers, step, cache, (3,) * 9)
    logits, _ = outcome(step, cache, tokens, (3,) * 9, step._layers)
    assert logits.shape == (9, 300)
    fp32 = DecodeStep(AquilaModel(step.model.config, dtype=torch.float32, seed=7).requires_grad_(False))
    assert not taken(fp32._layers, fp32, cache, (3,))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_the_processor(level, root, tmp_path):
    code = (
        "import test_step_layers as t\n"
        "for kind in t.KINDS:\n"
        "    for lengths in ((3,), (300, 5, 256), (9,) * 8):\n"
        "        t.test_equals_the_layers_one_after_the_other(kind, lengths, {})\n"
        "    t.test_equals_the_definition(kind)\n"
    )
    run_at_level(level, code, root, tmp_path)
