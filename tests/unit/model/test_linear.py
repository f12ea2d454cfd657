"""Several linear layers as one product: the same outputs and gradients, under the same names."""

import pytest
import torch
from torch._dynamo.utils import counters

from aquila.backend import devices
from aquila.generation.int8 import quantize
from aquila.model import AquilaModel
from aquila.model.linear import Linear, in_stored_order, join_products, put_side_by_side, side_by_side


@pytest.fixture
def make(small_config):
    def make(dtype=torch.float32, **options):
        config = small_config(n_heads=4, n_kv_heads=2, n_layers=2, multiple_of=16)
        return AquilaModel(config, dtype=dtype, seed=7, **options)

    return make


def flatten(model):
    """Puts the weights into one buffer, as ZeRO does."""
    order = [p for p in in_stored_order(model) if p.dim() > 1]
    buffer = torch.cat([p.detach().flatten() for p in order])
    place = 0
    for p in order:
        p.data = buffer[place : place + p.numel()].view(p.shape)
        place += p.numel()
    return buffer


def step(model):
    tokens = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(24) > 9).long().expand(2, -1).contiguous()
    loss = model(tokens, labels=tokens.roll(-1, 1), documents=documents)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["auto", "triangle"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_joined_products_give_the_same_loss_and_gradients(make, attention, recompute):
    apart, joined = (make(attention=attention, recompute=recompute) for _ in range(2))
    flatten(joined)
    join_products(joined)
    assert all(layer.attention.whole is not None for layer in joined.layers)
    assert all(layer.feed_forward.whole is not None for layer in joined.layers)
    (loss, gradients), (other_loss, other_gradients) = step(apart), step(joined)
    assert torch.allclose(loss, other_loss, rtol=1e-6)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert other_gradients[name].is_contiguous()
        assert torch.allclose(gradient, other_gradients[name], rtol=1e-4, atol=1e-6), name


def test_names_and_weights_stay_and_a_change_of_the_buffer_is_seen(make):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffer = flatten(model)
    join_products(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before) == list(model.state_dict())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    whole = model.layers[0].feed_forward.whole
    buffer.zero_()
    assert not whole.any()
    assert not model.layers[0].feed_forward.w3.weight.any()


def test_what_lies_apart_stays_apart_unless_it_may_be_copied(make):
    model = make()
    join_products(model)
    assert all(layer.attention.whole is None for layer in model.layers)
    join_products(model, copy=True)
    attention = model.layers[0].attention
    assert attention.whole.data_ptr() == attention.wq.weight.data_ptr()
    assert torch.equal(
        attention.whole, torch.cat([p.weight for p in (attention.wq, attention.wk, attention.wv)])
    )


def test_side_by_side_looks_at_memory_shape_and_dtype():
    buffer = torch.arange(24.0)
    a, b, c = buffer[:8].view(4, 2), buffer[8:12].view(2, 2), buffer[14:18].view(2, 2)
    assert torch.equal(side_by_side([a, b]), buffer[:12].view(6, 2))
    assert side_by_side([b, a]) is None
    assert side_by_side([a, c]) is None
    assert side_by_side([a, buffer[8:12].view(1, 4)]) is None
    assert side_by_side([a, b.clone()]) is None
    assert side_by_side([a.t(), b]) is None
    whole = put_side_by_side([a, c])
    assert torch.equal(whole, torch.cat([buffer[:8].view(4, 2), buffer[14:18].view(2, 2)]))


def test_layers_of_another_kind_are_not_passed_over(make):
    model = make()

    class Other(Linear):
        pass

    for layer in model.layers:
        layer.attention.wk.__class__ = Other
    flatten(model)
    join_products(model)
    assert model.layers[0].attention.whole is None
    assert model.layers[0].feed_forward.whole is not None


def test_int8_layers_are_joined_on_the_same_memory(make):
    model = make()
    quantize(model)
    x = torch.randn(3, model.config.dim)
    attention = model.layers[0].attention
    apart = attention.products(x)
    join_products(model, copy=True)
    assert attention.whole.int8.data_ptr() == attention.wq.int8.data_ptr()
    assert torch.allclose(attention.products(x), apart, rtol=1e-5, atol=1e-5)
    assert "attention.whole" not in " ".join(model.state_dict())


@pytest.mark.parametrize("lengths", [(24,), (24, 16)])
def test_compiled_through_the_gpus_module_it_is_one_graph_for_all_layers(make, monkeypatch, lengths):
    monkeypatch.setitem(devices._BACKENDS, "cpu", devices.cuda)
    torch._dynamo.reset()
    counters.clear()
    apart, joined = make(), make()
    flatten(joined)
    join_products(joined)
    joined.compile_blocks(backend="aot_eager", fullgraph=True)
    for length in lengths:
        tokens = torch.randint(joined.config.vocab_size, (2, length))
        for model in (apart, joined):
            model.zero_grad()
            model(tokens, labels=tokens.roll(-1, 1)).backward()
        for (name, p), q in zip(apart.named_parameters(), joined.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), name
    assert counters["stats"]["unique_graphs"] == len(lengths)
    assert not counters["graph_break"]
    stored = [layer.attention.wq.weight.grad for layer in joined.layers]
    assert all(gradient.is_contiguous() for gradient in stored)
