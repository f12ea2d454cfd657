"""What the GPU compiles, checked on CPU tensors: the loss, AdamW, the norm; and how little a step waits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aquila.backend import cuda, reference


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_loss_without_a_scatter_is_the_definition(z_loss: float, gradient: bool) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 333, generator=g, dtype=torch.float32) * 5
    labels, scale = torch.randint(333, (40,), generator=g), torch.rand(40, generator=g)
    theirs, ours = logits.clone(), logits.clone()
    wanted = reference.cross_entropy_(theirs, labels, scale, z_loss, gradient)
    assert torch.equal(cuda.loss_(ours, labels, scale, z_loss, gradient), wanted)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adamw_as_it_is_compiled(dtype: torch.dtype) -> None:
    """Two groups with a decay of their own, changing gradients, the factor on the device."""
    g = torch.Generator().manual_seed(1)
    first = torch.randn(1000, generator=g)
    for decay in (0.1, 0.0):
        settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
        states = [[first.to(dtype), first.clone(), *torch.zeros(2, 1000), torch.zeros(())] for _ in "ab"]
        for _ in range(5):
            gradient = (torch.randn(1000, generator=g) * 0.1).to(dtype)
            for backend, (weights, master, m, v, step) in zip((cuda, reference), states, strict=True):
                step += 1
                parts = [slice(0, 600), slice(600, None)]
                blocks = [(weights[p], master[p], gradient[p], m[p], v[p]) for p in parts]
                backend.adamw(blocks, step, settings, torch.tensor(0.7))
        for ours, theirs in zip(*states, strict=True):
            narrow = ours.dtype == torch.bfloat16  # another rounding may be the next number
            torch.testing.assert_close(ours, theirs, rtol=1e-2 if narrow else 1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_times_one_row_is_the_definition(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, 96, generator=g).to(dtype)
    weight = torch.randint(-127, 128, (40, 96), generator=g, dtype=torch.int8)
    scale = torch.rand(40, generator=g) / 127
    ours = cuda.int8_row_(x, weight, scale)
    exact = (x.double() @ weight.double().t() * scale.double()).to(dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_which_products_of_a_generation_step_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of int8 where there is a compiler; all else is the definition's."""
    compiled = []
    monkeypatch.setattr(cuda, "_compiled", lambda function, dynamic: compiled.append(function) or function)
    weight, scale = torch.ones(4, 8, dtype=torch.int8), torch.ones(4)
    for here, rows, given in [(True, 1, scale), (True, 2, scale), (True, 1, None), (False, 1, scale)]:
        monkeypatch.setattr(cuda, "_compiles", lambda here=here: here)
        x = torch.ones(rows, 8)
        out = cuda.step_linear(x, weight if given is not None else weight.float(), given)
        assert torch.equal(out, torch.full((rows, 4), 8.0))
    assert compiled == [cuda.int8_row_]


class Reads(TorchDispatchMode):
    """Counts values that the host reads from tensors: on a device each waits for all that was queued."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_adamw_reads_nothing_from_the_device() -> None:
    block = [torch.zeros(64) for _ in range(5)]
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    with Reads() as reads:
        cuda.adamw([tuple(block)], torch.ones(()), settings, torch.tensor(0.5))
    assert reads.count == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA H100 NVL", 835), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA A100-SXM4-80GB", 312),
    ],
)  # fmt: skip
def test_peaks_by_the_whole_name(name: str, peak: float) -> None:
    assert cuda.peak_flops_of(name, torch.bfloat16) == peak * 1e12


def test_generation_leaves_out_the_attention_that_plans_for_every_length():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        cuda.prepare_generation()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
