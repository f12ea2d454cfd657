"""The CPU's softmax cross-entropy with its gradient in place: a compiled kernel, or plain torch in blocks."""

import ctypes

import torch
from torch import Tensor

from aquila.backend.cpu_kernels import native

_NAMES = {torch.bfloat16: "cross_entropy_bf16", torch.float32: "cross_entropy_fp32"}
# fp32 bytes of logits that one pass of the blocked way holds: within the cache, yet few enough passes that
# the threads' meeting after each costs little where other processes share the cores.
_BLOCK_BYTES = 16 << 20


def available() -> bool:
    """Whether the compiled kernel is there (compiling it at the first call)."""
    return native.library("cross_entropy.cpp") is not None


def cross_entropy_(
    logits: Tensor, labels: Tensor, scale: Tensor, z_loss: float, gradient: bool
) -> Tensor | None:
    """As `reference.cross_entropy_`; None for what the kernel does not take."""
    library, name = native.library("cross_entropy.cpp"), _NAMES.get(logits.dtype)
    if library is None or name is None or not logits.is_contiguous() or logits.device.type != "cpu":
        return None
    rows, vocab = logits.shape
    labels, scale = labels.contiguous(), scale.float().contiguous()
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab:
        raise IndexError(f"a label is outside of the vocabulary of {vocab}")
    losses = torch.empty(rows, dtype=torch.float32)
    kernel = getattr(library, name)
    kernel.restype = None
    kernel.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_float] + [ctypes.c_int] * 2
    kernel(
        logits.data_ptr(), labels.data_ptr(), scale.data_ptr(), losses.data_ptr(), rows, vocab, z_loss,
        int(gradient), torch.get_num_threads(),
    )  # fmt: skip
    return losses


def blocked(logits: Tensor, labels: Tensor, scale: Tensor, z_loss: float, gradient: bool) -> Tensor:
    """The same in plain torch, a few rows at a time so that every pass after the first meets the cache."""
    rows = min(logits.shape[0], max(1, _BLOCK_BYTES // (4 * logits.shape[1])))
    losses = torch.empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    x_full = torch.empty(rows, logits.shape[1], dtype=losses.dtype)
    for first in range(0, logits.shape[0], rows):
        part = slice(first, first + rows)
        source, index, factor = logits[part], labels[part, None], scale[part, None].to(losses.dtype)
        x = x_full[: source.shape[0]].copy_(source)
        top = x.amax(1, keepdim=True)
        target = x.gather(1, index)
        total = x.sub_(top).exp_().sum(1, keepdim=True)
        lse = total.log() + top
        losses[part] = (lse - target + z_loss * lse.square())[:, 0]
        if gradient:
            x.mul_(factor * (1 + 2 * z_loss * lse) / total).scatter_add_(1, index, -factor)
            source.copy_(x)
    return losses
