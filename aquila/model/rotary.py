"""Angles of the rotary embedding (RoFormer, arXiv 2104.09864), in fp32."""

import torch
from torch import Tensor


class RotaryTables:
    """cos and sin of position * theta^(-2i / D), grown on demand, kept once a device.

    Not a buffer of the model on purpose: a model cast to bf16 would round its angles.
    """

    def __init__(self, head_dim: int, theta: float, length: int):
        self.head_dim, self.theta, self.length = head_dim, theta, length
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin fp32 (at least `length`, D / 2) on `device`."""
        held = self._tables.get(device)
        if held is None or held[0].shape[0] < length:
            # Computed on the CPU for every device: the same bits everywhere.
            size = max(self.length, 2 * length if held else length)
            held = tuple(table.to(device) for table in self.compute(size))
            self._tables[device] = held
        return held

    def compute(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin fp32 (length, D / 2), on the CPU."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        frequencies = 1.0 / (self.theta**exponents)
        positions = torch.arange(length, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, frequencies)
        return angles.cos(), angles.sin()


def positions_in_documents(documents: Tensor) -> Tensor:
    """Each token's position within its document: int64 (B, T) from never decreasing document numbers.

    The running greatest in doubling steps, in int32: cummax and searchsorted of an NPU are host kernels.
    """
    index = torch.arange(documents.shape[1], dtype=torch.int32, device=documents.device).expand_as(documents)
    first = torch.zeros_like(index)
    first[:, 1:] = torch.where(documents[:, 1:] != documents[:, :-1], index[:, 1:], 0)
    step = 1
    while step < first.shape[1]:
        first = torch.cat((first[:, :step], torch.maximum(first[:, step:], first[:, :-step])), dim=1)
        step *= 2
    return (index - first).long()
