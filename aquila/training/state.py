"""Where a run stands: the few integers from which everything else follows."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Saved with each checkpoint. The data order resumes from `consumed_samples` alone."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    consumed_tokens: int = 0
    bad_steps: int = 0
    """Steps in a row, up to now, whose loss or gradient was not finite."""

    def advance(self, samples: int, tokens: int, *, bad: bool) -> None:
        """One optimizer step has been taken, or skipped as `bad`."""
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        self.bad_steps = self.bad_steps + 1 if bad else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
