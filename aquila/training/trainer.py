"""The loop: take a step; log, evaluate and save at its boundary; stop when asked or done."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aquila.config import RunConfig
from aquila.errors import EXIT_FAILURE, EXIT_STOPPED
from aquila.training.checkpoint import Checkpointer
from aquila.training.engine import Engine, MicroBatch, StepResult
from aquila.training.metrics import RunLog, StepTimer
from aquila.training.schedule import Schedule
from aquila.training.state import TrainState


class StopRequest:
    """SIGTERM and SIGINT finish the step, save, and end the run with status 75."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = True
        if number == signal.SIGINT:  # a second Ctrl-C ends at once
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Trainer:
    """Everything that a run needs, built; `run` takes it to its end.

    batches: this rank's micro batches from `state.consumed_samples` on, without end.
    valid_batches: makes one evaluation's micro batches, always the same; None without that split.
    log: on rank 0 alone.
    """

    run_config: RunConfig
    engine: Engine
    schedule: Schedule
    batches: Iterator[MicroBatch]
    valid_batches: Callable[[], Iterator[MicroBatch]] | None
    checkpointer: Checkpointer
    log: RunLog | None
    state: TrainState
    stop: StopRequest
    samples_per_epoch: int
    tokens_per_step: int
    memory_gib: Callable[[], float]
    synchronize: Callable[[], None]
    saved_step: int = field(default=-1)

    def run(self) -> int:
        """Trains to the end. Returns the exit status: 0 done, 75 stopped on request, 1 gave up."""
        timer = StepTimer()
        while self.state.step < self.schedule.total_steps:
            timer.start()
            result = self._step()
            timer.stop()
            valid_loss = self._evaluate() if self._due(self.run_config.eval_interval) else None
            first = self.state.step == 1  # where the loss starts; and a launcher waits for this line
            if first or self._due(self.run_config.log_interval) or valid_loss is not None or result.skipped:
                self._log(result, timer.take(), valid_loss)
            if self.state.bad_steps >= self.run_config.max_bad_steps:
                return self._give_up(result)
            stopping = result.stop or self._due(self.run_config.exit_interval)
            if self._due(self.run_config.save_interval) or stopping:
                self._save()
            if stopping and self.state.step < self.schedule.total_steps:
                return EXIT_STOPPED if self.saved_step == self.state.step else EXIT_FAILURE
        if self.saved_step != self.state.step:
            self._save()
        return 0 if self.saved_step == self.state.step else EXIT_FAILURE

    def _step(self) -> StepResult:
        micro_batches = [next(self.batches) for _ in range(self.run_config.gradient_accumulation_steps)]
        learning_rate = self.schedule.learning_rate(self.state.step + 1)
        result = self.engine.train_step(micro_batches, learning_rate, stop_requested=self.stop.requested)
        self.synchronize()
        samples = self.run_config.global_batch_size(self.engine.world_size)
        self.state.advance(samples, self.tokens_per_step, bad=result.skipped)
        return result

    def _due(self, interval: int | None) -> bool:
        """True every `interval` steps, and for a final step that the interval would just miss never."""
        return bool(interval) and self.state.step % interval == 0

    def _evaluate(self) -> float | None:
        return self.engine.evaluate(self.valid_batches()) if self.valid_batches else None

    def _log(self, result: StepResult, step_seconds: float, valid_loss: float | None) -> None:
        if self.log is not None:
            self.log.step(
                self.state,
                loss=result.loss,
                learning_rate=self.schedule.learning_rate(self.state.step),
                grad_norm=result.grad_norm,
                loss_scale=result.loss_scale,
                step_seconds=step_seconds,
                memory_gib=self.memory_gib(),
                epoch=(self.state.consumed_samples - 1) // self.samples_per_epoch,
                valid_loss=valid_loss,
                skipped=result.skipped,
            )

    def _save(self) -> None:
        """A save that fails is reported and training goes on: the older checkpoints are whole."""
        try:
            folder = self.checkpointer.save(self.state)
            self.saved_step = self.state.step
            self._say(f"saved {folder}")
        except OSError as error:
            self._say(f"warning: the checkpoint of step {self.state.step} was not saved: {error}")
        if self.log is not None:
            self.log.draw()

    def _give_up(self, result: StepResult) -> int:
        bad = [rank for rank, loss in enumerate(result.rank_losses) if not abs(loss) < float("inf")]
        culprits = (
            f"ranks with a non-finite loss: {bad}" if bad else "every loss was finite, a gradient was not"
        )
        self._say(
            f"error: loss or gradient was not finite in {self.state.bad_steps} steps in a row, up to step "
            f"{self.state.step} ({culprits}). The newest checkpoint is from before. Lower lr, look at the "
            "data of these steps, or try precision fp32; max_bad_steps says how many are tolerated."
        )
        return EXIT_FAILURE

    def _say(self, text: str) -> None:
        if self.log is not None:
            print(text, flush=True)
