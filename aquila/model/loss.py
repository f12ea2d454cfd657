"""Cross-entropy that never holds the whole logits.

Where the device has a kernel for the whole of it, it does the whole of it. Elsewhere token chunks go through
output matrix, softmax and both gradient products in the forward pass, so that one chunk's logits are all that
ever exists. (The idea of computing gradients in the forward pass: Liger Kernel,
arXiv 2410.10989.) Shapes: N tokens, V vocabulary, dim width.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aquila.backend import get_backend, reference

# bf16 weight gradients summed in place are rounded once a chunk; beyond this many, sum in fp32.
MAX_ROUNDINGS = 4
# fp16 loses gradients under 6e-8, and softmax tails lie there: inside, they are held this much larger.
FP16_SCALE = 1024.0


def chunk_tokens(tokens: int, vocab_size: int, dtype: torch.dtype, backend: ModuleType = reference) -> int:
    """Tokens a chunk: as many as the backend's `LOGITS_BYTES` allow, spread evenly over the chunks."""
    most = max(16, backend.LOGITS_BYTES[dtype.itemsize] // (vocab_size * dtype.itemsize))
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    *,
    total: Tensor | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    backend: ModuleType | None = None,
    token_losses: list[Tensor] | None = None,
) -> Tensor:
    """Mean loss of the tokens that `loss_mask` counts: a scalar, fp32 (fp64 for fp64 inputs).

    hidden (..., dim); weight (V, dim), the output matrix; labels int64 (...), already shifted; loss_mask
    (...) weights each token (None: all count). Labels of masked tokens may be anything. With no token
    counted the loss and its gradients are zero. `z_loss` adds z_loss * mean(lse^2) (PaLM, arXiv 2204.02311).
    `total`: what the sum is divided by, where it is not the tokens that count here.
    `chunk`: tokens at a time, instead of what is best here. `token_losses` gets each token's loss times its
    mask, fp32 (...), without a gradient.
    """
    shape = labels.shape
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    mask = (
        torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask.reshape(-1).float()
    )
    if hidden.shape[0] != labels.shape[0] or mask.shape != labels.shape:
        raise ValueError(f"{hidden.shape[0]} hidden states, {len(labels)} labels, {len(mask)} mask values")
    labels = labels * (mask != 0)  # a product: filling int64 by a mask is a host kernel on an NPU
    total = (mask.sum() if total is None else total).clamp_min(torch.finfo(torch.float32).tiny)
    backend = backend or get_backend(hidden.device.type)
    found: list[Tensor] = []
    gradients = torch.is_grad_enabled()
    loss = _CrossEntropy.apply(hidden, weight, labels, mask, total, z_loss, chunk, backend, gradients, found)
    if token_losses is not None:
        token_losses.append(found[0].view(shape))
    return loss


class _CrossEntropy(torch.autograd.Function):
    """The gradients are made in forward, for an upstream gradient of one; backward scales them."""

    @staticmethod
    def forward(
        ctx, hidden, weight, labels, mask, total, z_loss, chunk, backend, with_gradients, token_losses
    ):
        half = hidden.dtype == torch.float16
        # Under fp16 the mean's division waits for backward, where the loss scale has come in.
        scale = mask * FP16_SCALE if half else mask / total
        ctx.rest = 1 / (total * FP16_SCALE) if half else None
        needs_grad = tuple(with_gradients and wants for wants in ctx.needs_input_grad[:2])
        given = hidden, weight, labels, scale, z_loss
        found = None if chunk else backend.whole_cross_entropy(*given, needs_grad)
        losses, *ctx.gradients = _chunked(*given, needs_grad, chunk, backend) if found is None else found
        ctx.dtype = weight.dtype
        token_losses.append(losses.detach() * mask)
        return token_losses[0].sum() / total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError("the loss gives its gradients once: a second backward has none left")
        factor = upstream if ctx.rest is None else upstream * ctx.rest
        hidden, weight = ctx.gradients
        ctx.gradients = None
        if factor.device.type != "cpu" or factor.item() != 1:  # multiplied in fp32, rounded once
            hidden = None if hidden is None else (hidden.to(factor.dtype) * factor).to(hidden.dtype)
            weight = None if weight is None else weight.mul_(factor)
        return hidden, None if weight is None else weight.to(ctx.dtype), *[None] * 8


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    z_loss: float,
    needs_grad: tuple[bool, bool],
    chunk: int | None,
    backend: ModuleType,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `reference.whole_cross_entropy`, a chunk of tokens after the other."""
    chunk = chunk or chunk_tokens(hidden.shape[0], weight.shape[0], hidden.dtype, backend)
    rounds = weight.dtype == torch.bfloat16 and -(-hidden.shape[0] // chunk) > MAX_ROUNDINGS
    in_fp32 = weight.dtype == torch.float16 or rounds
    hidden_grad = torch.empty_like(hidden) if needs_grad[0] else None
    weight_grad = (
        torch.empty_like(weight, dtype=torch.float32 if in_fp32 else None) if needs_grad[1] else None
    )
    losses = []
    held = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
    for first in range(0, hidden.shape[0], chunk):
        part = slice(first, first + chunk)
        logits = torch.mm(hidden[part], weight.t(), out=held[: len(hidden[part])])
        losses.append(
            backend.cross_entropy_(logits, labels[part], scale[part], z_loss, gradient=any(needs_grad))
        )
        if hidden_grad is not None:
            torch.mm(logits, weight, out=hidden_grad[part])
        if weight_grad is not None:
            backend.add_weight_gradient(weight_grad, logits, hidden[part], int(first > 0))
    return torch.cat(losses), hidden_grad, weight_grad
