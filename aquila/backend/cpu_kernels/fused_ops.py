"""The CPU's norm, gate, rotary embedding and optimizer as compiled passes over memory (`fused_ops.cpp`)."""

import ctypes
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aquila.backend import reference
from aquila.backend.cpu_kernels import native

_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def available() -> bool:
    """Whether the compiled passes are there (compiling them at the first call)."""
    return native.library("fused_ops.cpp") is not None


def _taken(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    alike = dtype in _NAMES and all(x.dtype == dtype and x.device.type == "cpu" for x in tensors)
    return alike and not torch.compiler.is_compiling() and available()


# What each kernel takes before the number of threads: pointers, int64, fp32.
_ARGUMENTS = {
    "norm": "pppp ii f",
    "norm_backward": "pppppp ii",
    "gated": "ppp iii",
    "gated_backward": "ppppp iii",
    "rotary": "pppp iiiii f",
    "table": "pppp iii",
    "squares": "pp i",
    "adamw": "pppppp i",
}
_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


@lru_cache(maxsize=32)
def _kernel(name: str, dtype: torch.dtype) -> ctypes._CFuncPtr:
    kernel = getattr(native.library("fused_ops.cpp"), f"{name}_{_NAMES[dtype]}")
    kernel.argtypes = [_C_TYPES[kind] for kind in _ARGUMENTS[name].replace(" ", "")] + [ctypes.c_int]
    kernel.restype = None
    return kernel


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    """Runs a kernel for `like`'s dtype; a tensor among the arguments stands for its address."""
    taken = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    _kernel(name, like.dtype)(*taken, torch.get_num_threads())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """As `reference.rms_norm`; None for other dtypes than bf16 and fp32."""
    if not _taken(x, weight):
        return None
    return _Norm.apply(x, weight, eps) if torch.is_grad_enabled() else _norm(x, weight, eps)[0]


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and each row's factor, which backward needs; x and weight contiguous or made so."""
    x, weight = x.contiguous(), weight.contiguous()
    y, rows = torch.empty_like(x), x.numel() // x.shape[-1]
    scale = torch.empty(rows, dtype=torch.float32)
    _call("norm", x, x, weight, y, scale, rows, x.shape[-1], eps)
    return y, scale


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, scale = _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        _call(
            "norm_backward",
            x,
            x,
            weight,
            scale,
            grad_output.contiguous(),
            dx,
            dweight,
            len(scale),
            x.shape[-1],
        )
        return dx, dweight, None


def embedding(tokens: Tensor, weight: Tensor) -> Tensor | None:
    """As `reference.embedding`, or None; a row's gradient is summed in fp32 and rounded once."""
    return _Embedding.apply(tokens, weight) if _taken(weight) else None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.like = weight.shape
        return reference.embedding(tokens, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        taken, order = tokens.flatten().sort(stable=True)
        gradient = grad_output.new_empty(ctx.like)
        _call("table", grad_output, grad_output.contiguous(), taken, order, gradient, len(taken), *ctx.like)
        return None, gradient


def swiglu(gate: Tensor, up: Tensor) -> Tensor | None:
    """As `reference.swiglu`, or None; for backward it keeps its inputs alone."""
    if not _taken(gate, up):
        return None
    gate, up = gate.contiguous(), up.contiguous()
    return _Gated.apply(gate, up) if torch.is_grad_enabled() else _gated(gate, up)


def swiglu_halves(gate_up: Tensor) -> Tensor | None:
    """As `reference.swiglu_halves`, or None; for backward it keeps its input alone."""
    if not _taken(gate_up):
        return None
    gate_up = gate_up.contiguous()
    return _GatedHalves.apply(gate_up) if torch.is_grad_enabled() else _gated(*gate_up.chunk(2, -1))


def _rows(gate: Tensor) -> tuple[int, int, int]:
    """Rows, their width, and how far apart they begin, of a tensor or of one half of its last dimension."""
    if gate.is_contiguous():
        return 1, gate.numel(), 0
    width = gate.shape[-1]
    return gate.numel() // width, width, gate.stride(-2)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    _call("gated", gate, gate, up, y, *_rows(gate))
    return y


def _gated_backward(gate: Tensor, up: Tensor, grad_output: Tensor, dgate: Tensor, dup: Tensor) -> None:
    _call("gated_backward", gate, gate, up, grad_output.contiguous(), dgate, dup, *_rows(gate))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _gated_backward(gate, up, grad_output, dgate, dup)
        return dgate, dup


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gated(*gate_up.chunk(2, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty_like(gate_up)
        _gated_backward(*gate_up.chunk(2, -1), grad_output, *gradient.chunk(2, -1))
        return gradient


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """As `reference.rotary`, or None."""
    return _Rotary.apply(x, cos.contiguous(), sin.contiguous()) if _taken(x) else None


class _Rotary(torch.autograd.Function):
    """Backward turns the gradient back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad_output, *ctx.saved_tensors, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    batch, positions, heads, dim = x.shape
    step = positions * dim // 2 if cos.shape[0] > 1 else 0
    _call("rotary", x, x, cos, sin, y, batch, positions, heads, dim // 2, step, direction)
    return y


def square_sum(pieces: Iterable[Tensor]) -> Tensor:
    """As `reference.square_sum`: squares and short sums in fp32, their sum in fp64."""
    return torch.tensor(sum(map(_squares, pieces)), dtype=torch.float64)


def _squares(x: Tensor) -> float:
    if not (_taken(x) and x.is_contiguous()):
        return reference.square_sum([x]).item()
    total = ctypes.c_double()
    _call("squares", x, x, ctypes.byref(total), x.numel())
    return total.value


class _Adam(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_float)
        for name in ("rest1", "beta2", "rest2", "eps", "decay", "step_size", "root", "factor")
    ]


_LANES = 16  # torch computes what remains of these in fp64


def adamw(
    blocks: Iterable[reference.AdamBlock], step: Tensor, settings: dict[str, Any], factor: float | Tensor
) -> None:
    """As `reference.adamw`, bit for bit."""
    beta1, beta2 = settings["betas"]
    steps, rate, factor = step.item(), settings["lr"], float(factor)
    values = _Adam(
        1 - beta1, beta2, 1 - beta2, settings["eps"], 1 - rate * settings["weight_decay"],
        rate / (1 - beta1**steps), math.sqrt(1 - beta2**steps), factor,
    )  # fmt: skip
    for block in blocks:
        weights, master, gradient, exp_avg, exp_avg_sq = block
        whole = master.numel() // _LANES * _LANES
        dense = all(x.is_contiguous() for x in block)
        if not (dense and master.dtype == torch.float32 and _taken(weights, gradient)):
            whole = 0
        if whole:
            _call(
                "adamw", weights, weights, master, gradient, exp_avg, exp_avg_sq, ctypes.byref(values), whole
            )
        if whole < master.numel():
            reference.adamw([tuple(x[whole:] for x in block)], step, settings, factor)
