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
from aquila.training.deepspeed.engine import Engine, MicroBatch, StepFlags, StepResult
from aquila.training.evaluation import Scores
from aquila.training.metrics import RunLog, StepTimer
from aquila.training.nonfinite import what_is_not_finite
from aquila.training.profiler import Profiler
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
    evaluate: the losses of the validation sets, on all ranks together; None without any set.
    documents_of: names the documents of a range of samples, for what is said of a bad step.
    after_save: what else is to be done with a finished checkpoint. log: on rank 0 alone.
    """

    config: RunConfig
    engine: Engine
    schedule: Schedule
    batches: Iterator[MicroBatch]
    evaluate: Callable[[], Scores] | None
    documents_of: Callable[[range], str]
    checkpointer: Checkpointer
    after_save: Callable[[Path], None]
    watchdog: Watchdog
    requests: Requests
    log: RunLog | None
    state: TrainState
    seq_length: int
    profiler: Profiler | None = None
    timer: StepTimer = field(default_factory=StepTimer)

    def run(self) -> int:
        """Trains to the end. Returns the exit status: 0 done, 75 stopped on request, 1 gave up."""
        saved = self.state.step  # the checkpoint it came from, or nothing to save yet
        if saved == 0 and self.config.eval_at_start:
            self._log_start(self._evaluate())
        while self.state.step < self.schedule.total_steps:
            result = self._step()
            stop = result.flags.stop or self._due(self.config.exit_interval)
            last = stop or self.state.step >= self.schedule.total_steps
            self._log(result, self._evaluate() if self._evaluation_due() else None, last)
            if self.state.bad_steps >= self.config.max_bad_steps:
                self._finish_save(saved)  # one may be in flight, from before
                return self._give_up(result)
            if self._due(self.config.replica_check_interval) and (bad := self.engine.diverged_ranks()):
                return self._diverged(bad)
            if result.flags.written:  # every rank's part of the save in flight is written
                saved = self._finish_save(saved)
            if result.flags.save or stop or self._due(self.config.save_interval):
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
        if self.profiler is not None:
            self.profiler.before(self.state.step + 1)
        self.timer.start()
        step = self.state.step + 1
        samples = self.schedule.samples_of(step)
        micro_steps = samples // (self.config.batch_size * self.config.replicas(self.engine.world_size))
        micro_batches = [next(self.batches) for _ in range(micro_steps)]
        flags = StepFlags(self.requests.stop, self.requests.save, self.checkpointer.written)
        self.requests.save = False
        if self.config.skips(step):
            result = self.engine.pass_over(flags)
        else:
            rate, above = self.schedule.learning_rate(step), self._spike_above()
            result = self.engine.train_step(micro_batches, rate, flags=flags, spike_above=above)
            self.timer.stop(result.forward_seconds)
        if self.log is not None:
            self.log.took(result)
        if result.skipped:
            self._explain(result)
        self.state.advance(
            samples,
            samples * self.seq_length,
            result.loss,
            skipped=result.skipped,
            bad=result.skipped and not (result.spike or result.passed_over or self._scale_may_fall(result)),
        )
        self.watchdog.beat(self.state.step)
        if self.profiler is not None:
            self.profiler.after(self.state.step)
        return result

    def _due(self, interval: int | None) -> bool:
        return interval is not None and interval > 0 and self.state.step % interval == 0

    def _spike_above(self) -> float | None:
        """The loss above which a step is skipped; only once the mean has settled."""
        if self.config.skip_spikes is None or self.state.step < _MEAN_OVER:
            return None
        return self.config.skip_spikes * self.state.mean_loss

    def _scale_may_fall(self, result: StepResult) -> bool:
        """An fp16 overflow with a finite loss is no fault while the loss scale can still be lowered."""
        finite = self.config.precision == "fp16" and math.isfinite(result.loss)
        return finite and result.loss_scale > self.engine.min_loss_scale

    def _evaluation_due(self) -> bool:
        at_end = self.config.eval_at_end and self.state.step == self.schedule.total_steps
        return at_end or self._due(self.config.eval_interval)

    def _evaluate(self) -> Scores | None:
        if self.evaluate is None:
            return None
        started = time.perf_counter()
        scores = self.evaluate()
        self.timer.other("eval_seconds", time.perf_counter() - started)
        self.watchdog.beat(self.state.step)
        return scores

    def _log_start(self, scores: Scores | None) -> None:
        if self.log is not None and scores is not None:
            self.log.start(self.state, self.timer, scores)

    def _log(self, result: StepResult, scores: Scores | None, last: bool) -> None:
        step = self.state.step
        tokens = self.schedule.samples_of(step) * self.seq_length
        # The first is where the loss starts, and a launcher waits for it. Between two lines all steps have
        # one size, so that rates, and the samples of a step, can be told from them.
        due = step == 1 or last or self._due(self.config.log_interval) or scores is not None
        due = due or result.skipped or tokens != self.schedule.samples_of(step + 1) * self.seq_length
        if self.log is None or not due:
            return
        if result.passed_over:
            self.log.passed_over(self.state, scores)
        else:
            self.log.step(self.state, result, self.schedule.learning_rate(step), self.timer, scores, tokens)

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
            self.log.sync()
            self.log.draw()
        return saved

    def _explain(self, result: StepResult) -> None:
        """Says which step was skipped, why, on whose account, and what was read."""
        if self.log is None:
            return
        step = self.state.step + 1
        if result.passed_over:
            return  # its line says so
        if result.spike:
            reason = f"loss {result.loss:.3f} is a spike over its mean {self.state.mean_loss:.3f}"
        elif self._scale_may_fall(result):
            then, now = result.loss_scale, self.engine.loss_scale
            self._say(f"step {step} overflowed fp16 at loss scale {then:g} and is skipped; now it is {now:g}")
            return
        else:
            reason = what_is_not_finite(result.rank_losses, result.bad_gradient_ranks)
        first = self.state.consumed_samples
        samples = range(first, first + self.schedule.samples_of(step))
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
