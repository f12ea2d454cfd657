"""Cross-entropy that never holds the whole logits.

Token chunks go through output matrix, softmax and both gradient products in the forward pass, so that one
chunk's logits are all that ever exists. (The idea of computing gradients in the forward pass: Liger Kernel,
arXiv 2410.10989.) Shapes: N tokens, V vocabulary, dim width.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aquila.backend import get_backend

# Bytes of logits that a chunk may take; the whole way holds N x V of them several times over. Half precision
# gets more, because fewer chunks mean fewer roundings of its weight gradient.
CHUNK_BYTES = {2: 200 << 20, 4: 150 << 20, 8: 300 << 20}
# bf16 weight gradients summed in place are rounded once a chunk; beyond this many, sum in fp32.
MAX_ROUNDINGS = 4
# fp16 loses gradients under 6e-8, and softmax tails lie there: inside, they are held this much larger.
FP16_SCALE = 1024.0


def chunk_tokens(tokens: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Tokens a chunk: as many as `CHUNK_BYTES` allow, spread evenly over the chunks."""
    most = max(16, CHUNK_BYTES[dtype.itemsize] // (vocab_size * dtype.itemsize))
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
    backend: ModuleType | None = None,
) -> Tensor:
    """Mean loss of the tokens that `loss_mask` counts: a scalar, fp32 (fp64 for fp64 inputs).

    hidden (..., dim); weight (V, dim), the output matrix; labels int64 (...), already shifted; loss_mask
    (...) weights each token (None: all count). Labels of masked tokens may be anything. With no token
    counted the loss and its gradients are zero. `z_loss` adds z_loss * mean(lse^2) (PaLM, arXiv 2204.02311).
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    mask = (
        torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask.reshape(-1).float()
    )
    if hidden.shape[0] != labels.shape[0] or mask.shape != labels.shape:
        raise ValueError(f"{hidden.shape[0]} hidden states, {len(labels)} labels, {len(mask)} mask values")
    labels = labels.masked_fill(mask == 0, 0)
    chunk = chunk or chunk_tokens(hidden.shape[0], weight.shape[0], hidden.dtype)
    backend = backend or get_backend(hidden.device.type)
    return _ChunkedCrossEntropy.apply(
        hidden, weight, labels, mask, z_loss, chunk, backend, torch.is_grad_enabled()
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are made in forward, for an upstream gradient of one; backward scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, mask, z_loss, chunk, backend, with_gradients):
        total = mask.sum().clamp_min(torch.finfo(torch.float32).tiny)
        half = hidden.dtype == torch.float16
        # Under fp16 the mean's division waits for backward, where the loss scale has come in.
        scale = mask * FP16_SCALE if half else mask / total
        ctx.rest = 1 / (total * FP16_SCALE) if half else None
        wants_hidden, wants_weight = (with_gradients and wanted for wanted in ctx.needs_input_grad[:2])
        grads = _Gradients(hidden, weight, chunk, wants_hidden, wants_weight, backend)
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        held = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
        for first in range(0, hidden.shape[0], chunk):
            part = slice(first, first + chunk)
            logits = torch.mm(hidden[part], weight.t(), out=held[: len(hidden[part])])
            losses = backend.cross_entropy_(
                logits, labels[part], scale[part], z_loss, gradient=wants_hidden or wants_weight
            )
            loss += (losses * mask[part]).sum()
            grads.add(part, logits, hidden[part], weight)
        ctx.grads = grads
        return loss / total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.grads is None:
            raise RuntimeError("the chunked loss gives its gradients once: a second backward has none left")
        factor = upstream if ctx.rest is None else upstream * ctx.rest
        hidden, weight = ctx.grads.scaled(factor)
        ctx.grads = None
        return hidden, weight, *[None] * 6


class _Gradients:
    """Gradients of hidden states (N, dim) and output matrix (V, dim), filled chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        chunk: int,
        wants_hidden: bool,
        wants_weight: bool,
        backend: ModuleType,
    ):
        self.backend = backend
        self.hidden = torch.empty_like(hidden) if wants_hidden else None
        self.dtype = weight.dtype
        chunks = -(-hidden.shape[0] // chunk)
        in_fp32 = self.dtype == torch.float16 or (self.dtype == torch.bfloat16 and chunks > MAX_ROUNDINGS)
        dtype = torch.float32 if in_fp32 else self.dtype
        self.weight = torch.empty_like(weight, dtype=dtype) if wants_weight else None
        self.started = False

    def add(self, part: slice, logits_grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Adds one chunk; `logits_grad` (chunk, V)."""
        if self.hidden is not None:
            self.backend.long_product(self.hidden[part], logits_grad, weight)
        if self.weight is None:
            return
        self.backend.add_weight_gradient(self.weight, logits_grad, hidden, int(self.started))
        self.started = True

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients times `factor`, a scalar tensor; multiplied in fp32, rounded once."""
        identity = factor.device.type == "cpu" and factor.item() == 1
        hidden, weight = self.hidden, self.weight
        if hidden is not None and not identity:
            hidden = (hidden * factor if hidden.dtype == factor.dtype else hidden.float() * factor).to(
                hidden.dtype
            )
        if weight is not None and not identity:
            weight.mul_(factor)
        return hidden, None if weight is None else weight.to(self.dtype)
