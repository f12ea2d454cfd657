"""The loop: take a step; log, evaluate and save at its boundary; stop when asked or done."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aquila.config import RunConfig
from aquila.core.errors import EXIT_FAILURE, EXIT_STOPPED
from aquila.training.checkpoint import Checkpointer
from aquila.training.console import say
from aquila.training.deepspeed.engine import Engine, MicroBatch, StepResult
from aquila.training.metrics import RunLog, StepTimer
from aquila.training.nonfinite import what_is_not_finite
from aquila.training.schedule import Schedule
from aquila.training.signals import Requests
from aquila.training.state import TrainState
from aquila.training.watchdog import Watchdog

_MEAN_OVER = 100
"""Steps over which the running mean of the loss looks back, for `skip_spikes`."""


@dataclass
class Trainer:
    """Everything that a run needs, built; `run` takes it to its end.

    batches: this rank's micro batches from `state.consumed_samples` on, without end.
    valid_batches: makes one evaluation's micro batches, always the same; none without that split.
    documents_of: names the documents of a range of samples, for what is said of a bad step.
    after_save: what else is to be done with a finished checkpoint. log: on rank 0 alone.
    """

    config: RunConfig
    engine: Engine
    schedule: Schedule
    batches: Iterator[MicroBatch]
    valid_batches: Callable[[], Iterator[MicroBatch]]
    documents_of: Callable[[range], str]
    checkpointer: Checkpointer
    after_save: Callable[[Path], None]
    watchdog: Watchdog
    requests: Requests
    log: RunLog | None
    state: TrainState
    seq_length: int
    synchronize: Callable[[], None]
    timer: StepTimer = field(default_factory=StepTimer)

    def run(self) -> int:
        """Trains to the end. Returns the exit status: 0 done, 75 stopped on request, 1 gave up."""
        saved = self.state.step  # the checkpoint it came from, or nothing to save yet
        while self.state.step < self.schedule.total_steps:
            result = self._step()
            stop = result.any_notice[0] or self._due(self.config.exit_interval)
            last = stop or self.state.step >= self.schedule.total_steps
            self._log(result, self._evaluate(), last)
            if self.state.bad_steps >= self.config.max_bad_steps:
                self._finish_save(saved)  # one may be in flight, from before
                return self._give_up(result)
            if self._due(self.config.replica_check_interval) and (bad := self.engine.diverged_ranks()):
                return self._diverged(bad)
            if result.all_notice[2]:  # every rank's part of the save in flight is written
                saved = self._finish_save(saved)
            if result.any_notice[1] or stop or self._due(self.config.save_interval):
                saved = self._save(saved)
            if stop:
                break
        if self.checkpointer.busy:
            saved = self._finish_save(saved)
        if saved < self.state.step:
            saved = self._finish_save(self._save(saved))
        if saved < self.state.step:
            return EXIT_FAILURE
        return 0 if self.state.step >= self.schedule.total_steps else EXIT_STOPPED

    def _step(self) -> StepResult:
        self.timer.start()
        micro_batches = [next(self.batches) for _ in range(self.config.gradient_accumulation_steps)]
        requests, self.requests.save = (self.requests.stop, self.requests.save), False
        result = self.engine.train_step(
            micro_batches,
            self.schedule.learning_rate(self.state.step + 1),
            notices=(*requests, self.checkpointer.written),
            spike_above=self._spike_above(),
        )
        self.synchronize()
        self.timer.stop(result.forward_seconds)
        if result.skipped:
            self._explain(result)
        samples = self.config.global_batch_size(self.engine.world_size)
        self.state.advance(
            samples,
            samples * self.seq_length,
            result.loss,
            skipped=result.skipped,
            bad=result.skipped and not result.spike and not self._scale_may_fall(result),
        )
        self.watchdog.beat(self.state.step)
        return result

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.state.step % interval == 0

    def _spike_above(self) -> float | None:
        """The loss above which a step is skipped; only once the mean has settled."""
        if self.config.skip_spikes is None or self.state.step < _MEAN_OVER:
            return None
        return self.config.skip_spikes * self.state.mean_loss

    def _scale_may_fall(self, result: StepResult) -> bool:
        """An fp16 overflow with a finite loss is no fault while the loss scale can still be lowered."""
        finite = self.config.precision == "fp16" and math.isfinite(result.loss)
        return finite and result.loss_scale > self.engine.min_loss_scale

    def _evaluate(self) -> float | None:
        if not self._due(self.config.eval_interval):
            return None
        started = time.perf_counter()
        loss = self.engine.evaluate(self.valid_batches())
        self.timer.other("eval_seconds", time.perf_counter() - started)
        self.watchdog.beat(self.state.step)
        return loss

    def _log(self, result: StepResult, valid_loss: float | None, last: bool) -> None:
        first = self.state.step == 1  # where the loss starts; and a launcher waits for this line
        due = first or last or self._due(self.config.log_interval)
        if self.log is not None and (due or valid_loss is not None or result.skipped):
            rate = self.schedule.learning_rate(self.state.step)
            self.log.step(self.state, result, rate, self.timer, valid_loss)

    def _save(self, saved: int) -> int:
        """Begins a save, after the one in flight; returns the newest step that is safely saved."""
        if self.checkpointer.busy:
            saved = self._finish_save(saved)
        self.checkpointer.begin(self.state)
        self.watchdog.beat(self.state.step)
        return saved if self.config.background_save else self._finish_save(saved)

    def _finish_save(self, saved: int) -> int:
        """A save that fails is reported and training goes on: the older checkpoints are whole."""
        if not self.checkpointer.busy:
            return saved
        try:
            folder, saved = self.checkpointer.finish()
        except OSError as error:
            self._say(f"warning: a checkpoint was not saved, and training goes on without it: {error}")
        else:
            self._say(f"saved {folder}")
            self.after_save(folder)
        self.timer.other("save_seconds", self.checkpointer.stall_seconds)
        self.checkpointer.stall_seconds = 0.0
        self.watchdog.beat(self.state.step)
        if self.log is not None:
            self.log.draw()
        return saved

    def _explain(self, result: StepResult) -> None:
        """Says which step was skipped, why, on whose account, and what was read."""
        if self.log is None:
            return
        step, ranks = self.state.step + 1, self.engine.world_size
        if result.spike:
            reason = f"loss {result.loss:.3f} is a spike over its mean {self.state.mean_loss:.3f}"
        elif self._scale_may_fall(result):
            then, now = result.loss_scale, self.engine.loss_scale
            self._say(f"step {step} overflowed fp16 at loss scale {then:g} and is skipped; now it is {now:g}")
            return
        else:
            reason = what_is_not_finite(result.rank_losses, result.bad_gradient_ranks)
        first = self.state.consumed_samples
        samples = range(first, first + self.config.global_batch_size(ranks))
        batch = self.documents_of(samples)
        self._say(f"warning: step {step} is skipped on all ranks: {reason}; its batch: {batch}")

    def _give_up(self, result: StepResult) -> int:
        self._say(
            f"error: loss or gradient was not finite in {self.state.bad_steps} steps in a row, up to step "
            f"{self.state.step} (max_bad_steps). The newest checkpoint is from before. Look at the documents "
            "named above, lower lr, or try precision fp32; skip_spikes leaves out single bad batches."
        )
        return EXIT_FAILURE

    def _diverged(self, ranks: list[int]) -> int:
        self._say(
            f"error: after step {self.state.step} the weights of rank(s) {ranks} differ from the others': a "
            "device or its memory is at fault. Exclude that device or node; the run goes on from its newest "
            "checkpoint when it is started again."
        )
        return EXIT_FAILURE

    def _say(self, text: str) -> None:
        if self.log is not None:
            say(text)
