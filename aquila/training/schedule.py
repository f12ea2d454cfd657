"""Length of the run and learning rate: pure functions of the step."""

import math
from dataclasses import dataclass

from aquila.config import RunConfig
from aquila.config.run import batch_sizes
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
    wsd_start: int | None = None
    """Step after which wsd decays, in place of its share."""
    rewarm: tuple[int, int] | None = None
    """(step, steps after it over which the rate rises from 0 to what it would be)."""
    batch_sizes: tuple[tuple[int, int], ...] = ((0, 1),)
    """(step, samples of each step after it), from step 0 on, in order."""

    def samples_of(self, step: int) -> int:
        """Samples over all devices that optimizer step `step`, counted from 1, consumes."""
        return next(samples for after, samples in reversed(self.batch_sizes) if after < step)

    def samples_between(self, first: int, last: int) -> int:
        """Samples of the steps after `first` up to `last`."""
        ends = [after for after, _ in self.batch_sizes[1:]] + [last]
        return sum(
            samples * max(0, min(end, last) - max(after, first))
            for (after, samples), end in zip(self.batch_sizes, ends, strict=True)
        )

    def learning_rate(self, step: int) -> float:
        """Rate of optimizer step `step`, counted from 1."""
        start, steps = self.rewarm or (0, 0)
        rising = (step - start) / steps if start < step < start + steps else 1.0
        return self._scheduled(step) * rising

    def _scheduled(self, step: int) -> float:
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.style == "constant":
            return self.peak
        start = self.warmup_steps
        if self.style == "wsd":
            stable = self.decay_steps - round(self.wsd_share * self.decay_steps)
            start = max(start, stable if self.wsd_start is None else self.wsd_start)
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
    sizes = batch_sizes(run, world_size)
    samples, batch = run.epochs * samples_per_epoch, sizes[0][1]
    total = run.train_iters or _steps_of(samples, sizes)
    if total == 0:
        raise UserError(
            f"the training split gives {samples} samples in {run.epochs} epochs, fewer than one global batch "
            f"of {batch} (batch_size x gradient_accumulation_steps x {world_size} devices); lower one of "
            "them, raise epochs, or use a larger corpus"
        )
    rewarm = None
    if run.rewarm_from is not None and run.rewarm_iters is not None:
        rewarm = (run.rewarm_from, run.rewarm_iters)
    warmup = run.warm_up_iters if run.warm_up_iters is not None else math.ceil(run.warm_up * total)
    return Schedule(
        peak=run.lr,
        final=run.final_lr,
        total_steps=total,
        warmup_steps=warmup,
        decay_steps=run.lr_decay_iters or total,
        style=run.lr_decay_style,
        wsd_share=run.wsd_decay,
        wsd_start=run.wsd_start,
        rewarm=rewarm,
        batch_sizes=tuple(sizes),
    )


def _steps_of(samples: int, sizes: list[tuple[int, int]]) -> int:
    """Whole steps that `samples` give."""
    ends = [after for after, _ in sizes[1:]]
    for (after, batch), end in zip(sizes, [*ends, None], strict=True):
        steps = samples // batch
        if end is None or after + steps < end:
            return after + steps
        samples -= (end - after) * batch
    raise AssertionError("the last size has no end")
