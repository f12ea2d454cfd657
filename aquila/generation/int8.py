"""Weights as int8, one scale a row: half of bf16's memory and, where memory is the limit, half of its time.

Symmetric rounding to nearest, row by row: weight ~ int8 * scale with scale = max |row| / 127. Activations
stay as they are. Embedding and norms keep their dtype. `python -m aquila.evaluate --int8` measures what the
rounding costs on a validation set.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquila.backend import get_backend
from aquila.model import AquilaModel
from aquila.model.linear import put_side_by_side

_FEW_ROWS = 16


class Int8Linear(nn.Module):
    """`nn.Linear` without bias whose weight is `int8` (N, K) times `scale` fp32 (N,)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.dtype = weight.dtype
        scale = weight.abs().amax(1).float().clamp_min(1e-30) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("int8", (weight.float() / scale[:, None]).round_().to(torch.int8))

    @property
    def out_features(self) -> int:
        """N."""
        return len(self.scale)

    @classmethod
    def join(cls, parts: Sequence["Int8Linear"]) -> "Int8Linear":
        """One layer that gives the outputs of `parts` side by side, on the same memory."""
        whole = cls.__new__(cls)
        nn.Module.__init__(whole)
        whole.dtype = parts[0].dtype
        for name in ("scale", "int8"):
            whole.register_buffer(name, put_side_by_side([getattr(part, name) for part in parts]))
        return whole

    @property
    def weight(self) -> Tensor:
        """The weight (N, K) in the dtype it had, computed anew at each access."""
        return (self.int8.float() * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:  # a generation step
            return get_backend(x.device.type).step_linear(x, self.int8, self.scale)
        rows = x.numel() // x.shape[-1]
        if rows > _FEW_ROWS:  # a prompt: one conversion for many rows
            return F.linear(x, self.weight)
        product = get_backend(x.device.type).step_linear
        return product(x.reshape(rows, -1).contiguous(), self.int8, self.scale).view(*x.shape[:-1], -1)


def memory_of(matrix: Tensor | nn.Module) -> Tensor:
    """What is read for a product with `matrix`: itself, or a linear layer's weight as it is held."""
    if isinstance(matrix, Int8Linear):
        return matrix.int8
    return matrix if isinstance(matrix, Tensor) else matrix.weight


@torch.no_grad()
def quantize(model: AquilaModel) -> None:
    """Replaces every matrix of the layers and the output matrix by its int8 form, one after the other."""
    for layer in model.layers:
        for part in (layer.attention, layer.feed_forward):
            for name, linear in list(part.named_children()):
                setattr(part, name, Int8Linear(linear))
    model.output = Int8Linear(model.output)
