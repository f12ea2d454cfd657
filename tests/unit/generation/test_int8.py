"""int8 weights: close to the weights they stand for, and the same function in prefill, step and loss."""

import pytest
import torch

from aquila.generation import generate
from aquila.generation.int8 import Int8Linear, quantize
from tests.unit.generation.models import small_model, tokens


def test_rounding_is_within_half_a_step_of_each_row():
    linear = torch.nn.Linear(64, 10, bias=False)
    linear.weight.data[3] *= 100
    linear.weight.data[4] = 0
    got = Int8Linear(linear)
    assert got.int8.dtype == torch.int8
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((got.weight - linear.weight).abs() <= step / 2 + 1e-7).all()
    assert (got.weight[4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_and_many_rows_are_one_function(dtype):
    layer = Int8Linear(torch.nn.Linear(64, 40, bias=False).to(dtype))
    x = torch.randn(3, 7, 64).to(dtype)
    many = layer(x)
    few = torch.stack([layer(row[None])[0] for row in x])
    torch.testing.assert_close(few, many, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=2e-2)


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_cache_changes_no_token_of_an_int8_model(kv_heads):
    model = small_model(n_kv_heads=kv_heads)
    before = model(torch.tensor([tokens(9)]))
    quantize(model)
    assert model.layers[0].attention.wq.int8.dtype == torch.int8
    after = model(torch.tensor([tokens(9)]))
    assert 0 < (after - before).abs().max() < 0.2 * before.abs().max()
    prompts = [tokens(3), tokens(12, seed=1)]
    cached = generate(model, prompts, max_new_tokens=20, temperature=0.0)
    assert cached == generate(model, prompts, max_new_tokens=20, temperature=0.0, use_cache=False)


def test_the_loss_of_an_int8_model_is_that_of_its_logits():
    model = small_model()
    quantize(model)
    ids = torch.tensor([tokens(20)])
    logits = model(ids[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), expected, atol=1e-5, rtol=1e-5)
