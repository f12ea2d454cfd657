"""Length of the run and learning rate: pure functions of the step."""

import math
from dataclasses import dataclass

from aquila.config import RunConfig
from aquila.core.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up from 0, then the chosen decay down to `final`.

    total_steps: optimizer steps of the whole run.
    warmup_steps: steps that rise; the last of them has the peak rate.
    decay_steps: step at which `final` is reached.
    """

    peak: float
    final: float
    total_steps: int
    warmup_steps: int
    decay_steps: int
    style: str
    wsd_share: float = 0.1

    def learning_rate(self, step: int) -> float:
        """Rate of optimizer step `step`, counted from 1."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.style == "constant":
            return self.peak
        start = self.warmup_steps
        if self.style == "wsd":
            start = max(start, self.decay_steps - round(self.wsd_share * self.decay_steps))
        if step <= start:
            return self.peak
        progress = min(1.0, (step - start) / max(1, self.decay_steps - start))
        if self.style == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.peak + (self.final - self.peak) * progress


def make_schedule(run: RunConfig, samples_per_epoch: int, world_size: int) -> Schedule:
    """The schedule of a run over `epochs` passes, or over `train_iters` steps where given.

    Raises `UserError` when the training split does not fill one global batch.
    """
    samples, batch = run.epochs * samples_per_epoch, run.global_batch_size(world_size)
    total = run.train_iters or samples // batch
    if total == 0:
        raise UserError(
            f"the training split gives {samples} samples in {run.epochs} epochs, fewer than one global batch "
            f"of {batch} (batch_size x gradient_accumulation_steps x {world_size} devices); lower one of "
            "them, raise epochs, or use a larger corpus"
        )
    warmup = run.warm_up_iters if run.warm_up_iters is not None else math.ceil(run.warm_up * total)
    return Schedule(
        peak=run.lr,
        final=run.final_lr,
        total_steps=total,
        warmup_steps=warmup,
        decay_steps=run.lr_decay_iters or total,
        style=run.lr_decay_style,
        wsd_share=run.wsd_decay,
    )
