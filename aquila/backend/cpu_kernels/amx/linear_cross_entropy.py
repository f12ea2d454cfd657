"""The CPU's loss of a whole batch with both gradients, on matrix tiles (`amx/linear_cross_entropy.cpp`)."""

import ctypes

import torch
from torch import Tensor

from aquila.backend.cpu_kernels import amx, native


class _Loss(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("tokens", "vocab", "dim")],
        ("z_loss", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("block", ctypes.c_int64),  # the kernel's own
    ]


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, z_loss: float, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """As `reference.whole_cross_entropy`; None for what the kernel does not take."""
    (tokens, dim), vocab = hidden.shape, weight.shape[0]
    if not hidden.dtype == weight.dtype == torch.bfloat16 or tokens == 0 or dim % 32 or not amx.available():
        return None
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    scale = scale.float().contiguous()
    if not 0 <= int(labels.min()) <= int(labels.max()) < vocab:
        raise IndexError(f"a label is outside of the vocabulary of {vocab}")
    losses, room = torch.empty(tokens, dtype=torch.float32), torch.empty(2, tokens, dtype=torch.float32)
    pairs = zip((hidden, weight), wanted, strict=True)
    gradients = [torch.empty_like(x) if want else None for x, want in pairs]
    kernel = native.library("amx/linear_cross_entropy.cpp").tile_loss
    kernel.restype = None
    shape = _Loss(tokens, vocab, dim, z_loss, torch.get_num_threads())
    tensors = (hidden, weight, labels, scale, losses, room, *gradients)
    kernel(ctypes.byref(shape), *[ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors])
    return losses, *gradients
