"""Angles of the rotary embedding (RoFormer, arXiv 2104.09864) and their scaled kinds, in fp32.

The operations and their order are those of transformers' `modeling_rope_utils`, for at position 100,000
another rounding of a frequency is another angle.
"""

import math

import torch
from torch import Tensor

from aquila.config.rope import RopeScaling


class RotaryTables:
    """cos and sin of position * frequency, grown on demand, kept once a device.

    Not a buffer of the model on purpose: a model cast to bf16 would round its angles. `length`: how many
    positions a device's first table has at least.
    """

    def __init__(self, head_dim: int, theta: float, length: int, scaling: RopeScaling | None = None):
        self.head_dim, self.theta, self.length, self.scaling = head_dim, theta, length, scaling
        self._tables: dict[tuple[torch.device, int], tuple[Tensor, ...]] = {}

    def on(self, device: torch.device, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin fp32 (at least `length`, D / 2) on `device`, for sequences of `length` tokens."""
        grown = self._grown(length)
        held = self._tables.get((device, grown))
        if held is None or held[0].shape[0] < length:
            # Computed on the CPU for every device: the same bits everywhere.
            size = length if grown else max(self.length, 2 * length if held else length)
            held = tuple(table.to(device) for table in self.compute(size, length))
            self._tables[device, grown] = held
            if grown:  # a growing sequence has a table for each of its lengths: the latest is enough
                self._tables = {k: v for k, v in self._tables.items() if k in ((device, grown), (device, 0))}
        return held

    def at(self, places: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin fp32 (n, D / 2) on `device` of the last tokens of sequences of `places` + 1 tokens.

        Each row by its own length alone, whatever its neighbours'.
        """
        if not self._grown(max(places) + 1):
            cos, sin = self.on(device, max(places) + 1)
            rows = torch.tensor(places, device=device)
            return cos[rows], sin[rows]
        angles = torch.stack([place * self.frequencies(place + 1) for place in places])
        cos, sin = self._turned(angles)
        return cos.to(device), sin.to(device)

    def compute(self, length: int, sequence: int = 0) -> tuple[Tensor, Tensor]:
        """cos, sin fp32 (length, D / 2) of a sequence of `sequence` tokens, on the CPU."""
        positions = torch.arange(length, dtype=torch.float32, device="cpu")
        return self._turned(torch.outer(positions, self.frequencies(sequence)))

    def frequencies(self, sequence: int = 0) -> Tensor:
        """Angle a position of each pair, fp32 (D / 2,), on the CPU; in a sequence of `sequence` tokens."""
        scaling, size = self.scaling, self.head_dim
        theta: float | Tensor = self.theta
        if scaling is not None and self._grown(sequence):
            length = torch.tensor(sequence)  # from here on fp32, as there
            longer = scaling.factor * length / scaling.original - (scaling.factor - 1)
            theta = theta * longer ** (size / (size - 2))
        powers = theta ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
        plain = 1.0 / powers
        if scaling is None or scaling.rope_type == "dynamic":
            return plain
        if scaling.rope_type == "linear":
            return plain / scaling.factor
        if scaling.rope_type == "yarn":
            kept = 1 - _ramp(*self._yarn_range(scaling), size // 2)
            return 1.0 / (scaling.factor * powers) * (1 - kept) + plain * kept
        return _by_wavelength(plain, scaling)

    def _grown(self, sequence: int) -> int:
        """The length on which frequencies depend: that of a sequence beyond the original context, else 0."""
        scaling = self.scaling
        dynamic = scaling is not None and scaling.rope_type == "dynamic" and sequence > scaling.original
        return sequence if dynamic else 0

    def _turned(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles.cos(), angles.sin()
        if self.scaling is None or self.scaling.amplitude == 1:
            return cos, sin
        return cos * self.scaling.amplitude, sin * self.scaling.amplitude

    def _yarn_range(self, scaling: RopeScaling) -> tuple[float, float]:
        """The pairs between which interpolation sets in (arXiv 2309.00071, section 3.2)."""

        def pair(turns: float) -> float:  # the pair that turns so often within the original context
            return (
                self.head_dim
                * math.log(scaling.original / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        return low, high + 0.001 if low == high else high


def _ramp(low: float, high: float, size: int) -> Tensor:
    """0 up to `low`, 1 from `high` on, a line between: fp32 (size,)."""
    return ((torch.arange(size, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)


def _by_wavelength(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: long waves are stretched, short ones stay, those between are mixed."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None
    assert high is not None
    waves = 2 * math.pi / plain
    stretched = plain / scaling.factor
    share = (scaling.original / waves - low) / (high - low)
    mixed = (1 - share) * plain / scaling.factor + share * plain
    between = torch.where(waves < scaling.original / high, plain, mixed)
    return torch.where(waves > scaling.original / low, stretched, between)


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
