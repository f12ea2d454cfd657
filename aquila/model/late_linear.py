"""A linear layer's product that keeps no weight for backward, for weights that are there only when asked for.

ZeRO-3 gathers a layer's weights for its forward pass, drops them, and gathers them again for backward, in the
same parameter. torch's product keeps a transposed view of the weight, and with it the gathered memory: every
rank would hold the whole model at the end of forward. Here the parameter itself is kept, whatever it holds.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aquila.backend import get_backend


class LateLinear(torch.autograd.Function):
    """x weight^T: x (..., K), weight a parameter (N, K), returns (..., N); gradients as torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)  # a parameter is kept as itself, so that its memory can go
        return get_backend(x.device.type).linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_x, rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
