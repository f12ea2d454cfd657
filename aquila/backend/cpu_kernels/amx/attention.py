"""The CPU's bf16 attention on matrix tiles (`attention.cpp`), as torch operators.

torch's own kernel takes three times as long for a forward and backward pass of 2 x 1024 tokens, and reads a
document mask of every query with every key; here a query's first key says as much.
"""

import ctypes

import torch
from torch import Tensor

from aquila.backend.cpu_kernels import amx, native


class _Shape(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("batch", "queries", "keys", "heads", "kv_heads", "dim")],
        *[(f"{x}_{axis}", ctypes.c_int64) for x in "qkv" for axis in ("batch", "row", "head")],
        ("first", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these: bf16, more than one query, heads of a multiple of 32."""
    alike = all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (q, k, v))
    return alike and q.shape[1] > 1 and q.shape[-1] % 32 == 0 and amx.available()


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, start: int) -> Tensor:
    """As `reference.attention`, of what `takes` took."""
    first = None if documents is None else first_keys(documents)[:, start:].contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)) and start > 0:
        raise ValueError("attention behind a cache has no backward")
    return torch.ops.aquila.tile_attention(q, k, v, first)[0]


def first_keys(documents: Tensor) -> Tensor:
    """For each position the place of its document's first token: int32 (B, T), from (B, T)."""
    places = torch.arange(documents.shape[1], dtype=torch.int32).expand_as(documents)
    opens = documents[:, 1:] != documents[:, :-1]
    firsts = torch.zeros_like(places)
    firsts[:, 1:] = torch.where(opens, places[:, 1:], 0)
    return firsts.cummax(dim=1).values


@torch.library.custom_op("aquila::tile_attention", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (B, S, H, D) and the logarithm of each softmax's sum, fp32 (B, H, S)."""
    batch, queries, heads, dim = q.shape
    out = q.new_empty(batch, queries, heads, dim)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32)
    _call("attention_forward", _shape(q, k, v, first), q, k, v, out, lse)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("aquila::tile_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    shape = _shape(q, k, v, first)
    _call("attention_backward", shape, q, k, v, out, lse, grad.contiguous(), *grads)
    return tuple(grads)


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.first = inputs[3]


def _gradient(ctx, grad: Tensor, _) -> tuple:
    q, k, v, out, lse = ctx.saved_tensors
    return *torch.ops.aquila.tile_attention_backward(q, k, v, ctx.first, out, lse, grad), None


torch.library.register_autograd("aquila::tile_attention", _gradient, setup_context=_keep)


def _shape(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> _Shape:
    batch, queries, heads, dim = q.shape
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    where = None if first is None else first.data_ptr()
    sizes = batch, queries, k.shape[1], heads, k.shape[2], dim
    return _Shape(*sizes, *strides, where, dim**-0.5, torch.get_num_threads())


def _call(name: str, shape: _Shape, *tensors: Tensor) -> None:
    kernel = getattr(native.library("amx/attention.cpp"), name)
    kernel.restype = None
    kernel(ctypes.byref(shape), *[ctypes.c_void_p(x.data_ptr()) for x in tensors])
