"""Where a run stands: the few numbers from which everything else follows."""

import math
from dataclasses import asdict, dataclass
from typing import Any

_MEMORY = 0.98
"""Share of the running mean that a step leaves: it looks back about 50 steps."""


@dataclass
class TrainState:
    """Saved with each checkpoint. The data order resumes from `consumed_samples` alone."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    consumed_tokens: int = 0
    bad_steps: int = 0
    """Steps in a row, up to now, whose loss or gradient was not finite."""
    mean_loss: float = 0.0
    """Running mean of the loss, without skipped steps."""

    def advance(self, samples: int, tokens: int, loss: float, *, skipped: bool, bad: bool) -> None:
        """One optimizer step has been taken, or skipped; `bad` when it was no fault of the loss scale."""
        if not skipped and math.isfinite(loss):
            self.mean_loss = _MEMORY * self.mean_loss + (1 - _MEMORY) * loss if self.mean_loss else loss
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        self.bad_steps = self.bad_steps + 1 if bad else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
