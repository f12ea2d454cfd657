"""The model: names, shapes, document masks, cache, recomputation, compilation."""

import json
import subprocess
import sys

import pytest
import torch

from aquila.config import ModelConfig, load_model_config
from aquila.model import AquilaModel, KVCache

KINDS = ("fused", "triangle", "reference")


def tokens_of(config, rows=2, seq=40, seed=1):
    return torch.randint(config.vocab_size, (rows, seq), generator=torch.Generator().manual_seed(seed))


def gradients(model, *args, **kwargs):
    model.zero_grad()
    loss = model(*args, **kwargs)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max().item() < tolerance


def test_parameters_have_the_released_names_and_shapes(small_config):
    model = AquilaModel(small_config(n_layers=1), device="meta")
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "tok_embeddings.weight": (211, 48),
        "layers.0.attention.wq.weight": (48, 48),
        "layers.0.attention.wk.weight": (16, 48),
        "layers.0.attention.wv.weight": (16, 48),
        "layers.0.attention.wo.weight": (48, 48),
        "layers.0.feed_forward.w1.weight": (128, 48),
        "layers.0.feed_forward.w2.weight": (48, 128),
        "layers.0.feed_forward.w3.weight": (128, 48),
        "layers.0.attention_norm.weight": (48,),
        "layers.0.ffn_norm.weight": (48,),
        "norm.weight": (48,),
        "output.weight": (211, 48),
    }
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("folder", ["aquila-7b", "aquila2-7b", "aquila2-34b", "aquila2-70b", "aquila-tiny"])
def test_shipped_configurations_count_their_parameters_right(root, folder):
    config = load_model_config(root / "checkpoints_in" / folder)
    model = AquilaModel(config, device="meta")
    assert model.parameter_count() == config.parameter_count()
    matrices = sum(p.numel() for name, p in model.named_parameters() if name != "tok_embeddings.weight")
    flops = 6 * matrices + 6 * config.n_layers * config.dim * 2048
    assert config.flops_per_token(2048) == flops


def test_aquila_7b_has_its_published_size(root):
    config = load_model_config(root / "checkpoints_in" / "aquila-7b")
    assert config.parameter_count() == 7_295_537_152
    assert config.flops_per_token(2048) == pytest.approx(42.93e9, rel=1e-3)


@pytest.mark.parametrize(
    ("folder", "hidden", "kv_heads", "seq"),
    [("aquila-7b", 11008, 32, 2048), ("aquila2-34b", 24576, 8, 4096), ("aquila2-70b", 28672, 8, 4096)],
)
def test_shipped_configurations_have_the_published_shapes(root, folder, hidden, kv_heads, seq):
    config = load_model_config(root / "checkpoints_in" / folder)
    assert (config.ffn_dim, config.kv_heads, config.max_seq_len) == (hidden, kv_heads, seq)


def test_first_weights_are_the_same_for_every_dtype_and_have_the_given_spread(small_config):
    config = small_config(initializer_range=0.03, vocab_size=2000)
    first, narrow = AquilaModel(config, seed=4), AquilaModel(config, seed=4, dtype=torch.bfloat16)
    for (name, a), b in zip(first.named_parameters(), narrow.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)
        if a.dim() == 1:
            assert torch.equal(a, torch.ones_like(a)), name
        else:
            assert a.std().item() == pytest.approx(0.03, rel=0.1)
    assert not torch.equal(first.output.weight, AquilaModel(config, seed=5).output.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_batch_equals_its_documents_one_by_one(small_config, kind):
    model = AquilaModel(small_config(), attention=kind)
    tokens, labels = tokens_of(model.config), tokens_of(model.config, seed=2)
    parts = [(0, 0, 15), (0, 15, 40), (1, 0, 7), (1, 7, 8), (1, 8, 40)]
    documents = torch.zeros_like(tokens)
    for row, first, _ in parts:
        documents[row, first:] += first > 0
    logits = model(tokens, documents=documents)
    for row, first, end in parts:
        alone = model(tokens[row : row + 1, first:end])
        assert close(logits[row : row + 1, first:end], alone)
    _, packed = gradients(model, tokens, labels, documents=documents)
    model.zero_grad()
    for row, first, end in parts:
        part = slice(row, row + 1), slice(first, end)
        (model(tokens[part], labels[part]) * (end - first) / tokens.numel()).backward()
    assert all(close(packed[name], p.grad, 1e-6) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_single_steps_equal_the_whole(small_config, kind):
    model = AquilaModel(small_config(), attention=kind)
    tokens = tokens_of(model.config, seq=30)
    cache = KVCache(model.config, 2, 30)
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(part, cache=cache) for part in tokens.split([11, 1, 1, 6, 1, 10], dim=1)]
    assert cache.length == 30
    assert close(torch.cat(parts, dim=1), whole)
    with pytest.raises(ValueError, match="holds 30 of 30 tokens: 1 more do not fit"):
        model(tokens[:, :1], cache=cache)


def test_prompts_padded_on_the_left_are_computed_exactly(small_config):
    model = AquilaModel(small_config())
    long, short = tokens_of(model.config, rows=1, seq=12), tokens_of(model.config, rows=1, seq=5, seed=3)
    tokens = torch.cat((long, torch.cat((torch.zeros(1, 7, dtype=torch.int64), short), dim=1)))
    documents = torch.ones_like(tokens)
    documents[1, :7] = 0
    cache, following = KVCache(model.config, 2, 20), torch.tensor([[5], [9]])
    with torch.no_grad():
        model(tokens, documents=documents, cache=cache)
        got = model(following, cache=cache)
        for row, prompt in enumerate((long, short)):
            assert close(got[row, -1], model(torch.cat((prompt, following[row : row + 1]), dim=1))[0, -1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layers", [1, -1])
def test_recomputation_changes_no_gradient(small_config, kind, recompute, layers):
    plain = AquilaModel(small_config(), attention=kind)
    config = small_config(checkpoint_activations=True, ckpoint_layer=layers)
    model = AquilaModel(config, attention=kind, recompute=recompute)
    tokens = tokens_of(config)
    wanted, got = gradients(plain, tokens, tokens), gradients(model, tokens, tokens)
    assert got[0] == wanted[0]
    assert all(torch.equal(got[1][name], gradient) for name, gradient in wanted[1].items())


def test_memory_falls_with_each_recomputed_layer(small_config, memory_meter):
    def peak(layers, recompute="full"):
        config = small_config(checkpoint_activations=layers > 0, ckpoint_layer=layers)
        model, meter = AquilaModel(config, recompute=recompute), memory_meter()
        tokens = tokens_of(config, seq=64)
        with meter:
            hidden = model.hidden(tokens)
        held = meter.held
        del hidden
        return held

    held = [peak(layers) for layers in range(4)]
    assert held == sorted(held, reverse=True)
    assert held[3] < 0.25 * held[0]
    assert held[3] < peak(3, "selective") < 0.5 * held[0]


def test_a_model_cast_to_bf16_keeps_its_angles(small_config):
    model = AquilaModel(small_config()).bfloat16()
    cos, _ = model.rotary_tables.on(torch.device("cpu"), 10)
    assert cos.dtype == torch.float32
    assert model(tokens_of(model.config)).dtype == torch.bfloat16


def test_wrong_choices_are_named(small_config):
    with pytest.raises(ValueError, match="attention 'flash' is not one of auto, fused"):
        AquilaModel(small_config(), attention="flash")
    with pytest.raises(ValueError, match="recompute 'some' is not one of full, selective"):
        AquilaModel(small_config(), recompute="some")


@pytest.mark.parametrize(
    ("compiler", "layers"), [pytest.param("inductor", 1, marks=pytest.mark.slow), ("aot_eager", 3)]
)
def test_compiled_blocks_compute_the_same_and_do_not_compile_again(small_config, compiler, layers):
    from torch._dynamo.utils import counters

    config = small_config(n_layers=layers, checkpoint_activations=layers > 1, ckpoint_layer=1)
    model, plain = AquilaModel(config), AquilaModel(config)
    torch._dynamo.reset()
    counters.clear()
    model.compile_blocks(backend=compiler)
    tokens = tokens_of(config)
    wanted, got = gradients(plain, tokens, tokens), gradients(model, tokens, tokens)
    assert got[0] == pytest.approx(wanted[0], rel=1e-6)
    assert all(close(got[1][name], gradient, 1e-6) for name, gradient in wanted[1].items())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    graphs = counters["stats"]["unique_graphs"]
    for seed in range(3):
        gradients(model, tokens_of(config, seed=seed), tokens)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_the_configuration_goes_through_json(small_config):
    config = small_config()
    assert ModelConfig(**json.loads(json.dumps(config.model_dump()))) == config


def test_a_model_without_values_imports_no_compiler(root):
    """torch's own first values on device "meta" would import its compiler: a second at each start."""
    code = (
        "import sys; from aquila.config import load_model_config; from aquila.model import AquilaModel\n"
        f"AquilaModel(load_model_config({str(root / 'checkpoints_in/aquila-tiny')!r}), device='meta')\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
