"""Linear layers in float8: what is converted, what they compute, and what is said where they cannot run."""

import sys

import pytest
import torch
from torch import nn

from aquila.backend import fp8, get_backend
from aquila.config import ModelConfig
from aquila.core.errors import UserError
from aquila.model import AquilaModel

needs_torchao = pytest.mark.skipif(fp8.problem() is not None, reason=str(fp8.problem()))
recipes = pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "vocab_size": 211}


def model_of(recipe=None, dtype=torch.float32, recompute="full", **changes):
    config = ModelConfig(**{**SIZES, "max_seq_len": 64, **changes})
    model = AquilaModel(config, dtype=dtype, recompute=recompute)
    if recipe:
        model.convert_to_fp8(recipe)
    return model


def gradients(model):
    tokens = torch.randint(211, (2, 64), generator=torch.Generator().manual_seed(1))
    loss = model(tokens, labels=tokens)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@needs_torchao
@recipes
def test_the_layers_matrices_are_converted_and_nothing_else(recipe):
    model = model_of(dtype=torch.bfloat16)
    before, plain_loss = dict(model.named_parameters()), gradients(model)[0]
    model.zero_grad()
    model.convert_to_fp8(recipe)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("output") == "Linear"
    assert set(kinds.values()) == {"Float8Linear"}
    assert len(kinds) == 7 * SIZES["n_layers"]
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    loss = gradients(model)[0]
    assert loss != plain_loss
    assert loss == pytest.approx(plain_loss, rel=1e-2)


def rounded(x, largest, kind, dim=None):
    """x as float8 numbers and their scale hold it: the scale takes the largest value to float8's own."""
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = largest / amax
    if dim is not None:
        scale = 2.0 ** scale.log2().floor()
    return (x * scale).to(kind).float() / scale


@needs_torchao
@recipes
def test_the_three_products_take_operands_rounded_to_float8(recipe):
    torch.manual_seed(3)
    layers = nn.ModuleList([nn.Linear(32, 48, bias=False)])
    x, slope = torch.randn(16, 32, requires_grad=True), torch.randn(16, 48)
    weight = layers[0].weight
    get_backend("cpu").convert_to_fp8(layers, recipe)
    y = layers[0](x)
    y.backward(slope)
    e4m3, e5m2 = (448.0, torch.float8_e4m3fn), (57344.0, torch.float8_e5m2)
    with torch.no_grad():
        if recipe == "tensorwise":
            x8, w8, s8 = rounded(x, *e4m3), rounded(weight, *e4m3), rounded(slope, *e5m2)
            wanted = x8 @ w8.t(), s8 @ w8, s8.t() @ x8
        else:
            wanted = (
                rounded(x, *e4m3, 1) @ rounded(weight, *e4m3, 1).t(),
                rounded(slope, *e4m3, 1) @ rounded(weight, *e4m3, 0),
                rounded(slope, *e4m3, 0).t() @ rounded(x, *e4m3, 0),
            )
    for got, value in zip((y, x.grad, weight.grad), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)


@needs_torchao
@recipes
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_recomputed_and_compiled_layers_compute_the_same(recipe, recompute, compiled):
    """In fp32: what compiling rounds otherwise in bf16 moves numbers to their float8 neighbours."""
    wanted_loss, wanted = gradients(model_of(recipe))
    model = model_of(recipe, recompute=recompute, checkpoint_activations=True, ckpoint_layer=1)
    if compiled:
        torch._dynamo.reset()
        model.compile_blocks(backend="aot_eager")
    loss, got = gradients(model)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_a_missing_or_old_torchao_is_said_with_what_to_do(monkeypatch):
    def missing(name):
        raise fp8.PackageNotFoundError(name)

    monkeypatch.setattr(fp8, "version", missing)
    assert "torchao is not installed; install it: python -m pip install" in get_backend("cpu").fp8_support()
    monkeypatch.setattr(fp8, "version", lambda name: "0.9.0+cpu")
    assert "torchao 0.9.0+cpu is too old" in get_backend("cpu").fp8_support()
    with pytest.raises(UserError, match="too old"):
        model_of("tensorwise")
    monkeypatch.setattr(fp8, "version", lambda name: "1.0.0")
    assert get_backend("cpu").fp8_support() == "emulated"


def test_a_torchao_that_does_not_load_is_said(monkeypatch, tmp_path):
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("raise AttributeError('made for another torch')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fp8, "version", lambda name: "0.18.0")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"torchao 0.18.0 does not load with this torch \(made for another"):
        fp8.load()


def test_each_device_says_whether_its_products_can_be_in_float8(monkeypatch):
    monkeypatch.setattr(fp8, "version", lambda name: "0.18.0")
    cuda = get_backend("cuda")
    assert cuda.fp8_support_of("NVIDIA H200", (9, 0)) == "native"
    assert cuda.fp8_support_of("NVIDIA L40S", (8, 9)) == "native"
    assert "compute capability 8.0" in cuda.fp8_support_of("NVIDIA A100", (8, 0))
    assert "NPU" in get_backend("npu").fp8_support()
    with pytest.raises(UserError, match="fp8: rowwise: torchao's float8 layers do not run on an NPU"):
        get_backend("npu").convert_to_fp8(nn.ModuleList(), "rowwise")
