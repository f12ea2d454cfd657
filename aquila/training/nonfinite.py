"""Whose gradient was not finite: looked at on each rank before the ranks' gradients are summed."""

import math
from collections.abc import Iterable

import torch


class GradientCheck:
    """Looks at a rank's gradients, from the start of a step on.

    A sum is not finite when any of its terms is not. It is kept on the device, and nothing is read back
    before `total` is.
    """

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), dtype=torch.float32, device=device)

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Looks at their gradients as backward makes them: two tiny launches and one pass for each."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(self.look)

    def look(self, gradient: torch.Tensor) -> None:
        """Takes `gradient` into account."""
        gradient = gradient.detach()
        # Finite fp16 gradients may add up to more than fp16 holds. bf16 reaches as far as fp32, and its own
        # sum is several times as fast as one that widens.
        half = gradient.dtype == torch.float16
        self._total += gradient.sum(dtype=torch.float32) if half else gradient.sum()

    def start(self) -> None:
        """A new step."""
        self._total.zero_()

    @property
    def total(self) -> torch.Tensor:
        """Not finite when a gradient since `start` was not; fp32 scalar on the device."""
        return self._total


def what_is_not_finite(rank_losses: list[float], bad_gradient_ranks: list[int]) -> str:
    """In words, with the ranks."""
    losses = [rank for rank, loss in enumerate(rank_losses) if not math.isfinite(loss)]
    if losses:
        return f"loss not finite on ranks {losses}"
    if bad_gradient_ranks:
        return f"gradient not finite on ranks {bad_gradient_ranks}, every loss was"
    return "the ranks' gradients overflowed when they were summed; every loss and every gradient was finite"
