"""What a run says of itself: metrics.jsonl, the console, boards, plots. Rank 0 only."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aquila.core.files import write_atomically
from aquila.core.jsonl import objects
from aquila.training.console import say
from aquila.training.deepspeed.engine import StepResult
from aquila.training.evaluation import Scores
from aquila.training.metric_writers import MetricWriter
from aquila.training.state import TrainState

METRICS = "metrics.jsonl"
SCORES = "lm_eval.jsonl"
"""Scores of checkpoints, which come when training has gone on: a line for each."""


class StepTimer:
    """Seconds of training steps since the last log line, without saves and evaluations.

    The first step of a process compiles and warms caches; it counts only where nothing else does.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._forward: list[list[float]] = []
        self._others: dict[str, float] = {}
        self._first: float | None = None
        self._started = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, forward_seconds: list[float]) -> None:
        """Ends a step. forward_seconds: of each rank, before it waits for any other."""
        seconds = time.perf_counter() - self._started
        if self._first is None:
            self._first = seconds
        else:
            self._seconds.append(seconds)
            self._forward.append(forward_seconds)

    def other(self, name: str, seconds: float) -> None:
        """Time that training stood still for something else."""
        self._others[name] = self._others.get(name, 0.0) + seconds

    def take(self) -> tuple[float, dict[str, Any]]:
        """Since the last call: mean seconds a step, and what else there is to say.

        The rest has `slowest_rank` and `slowest_rank_excess` (its forward time over the mean of all,
        minus 1) where there are several ranks, and the seconds of other things by name.
        """
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else self._first or 0.0
        rest: dict[str, Any] = {name: round(seconds, 3) for name, seconds in self._others.items()}
        if self._forward and len(self._forward[0]) > 1:
            sums = [sum(column) for column in zip(*self._forward, strict=True)]
            slowest = max(range(len(sums)), key=sums.__getitem__)
            rest["slowest_rank"] = slowest
            rest["slowest_rank_excess"] = round(sums[slowest] * len(sums) / sum(sums) - 1, 3)
        self._seconds, self._forward, self._others = [], [], {}
        return mean, rest


class CorpusLosses:
    """Of the steps since the last line: loss of each corpus, over its counted tokens."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._sums: list[tuple[float, float]] = []

    def add(self, result: StepResult) -> None:
        """Takes in a step; one that was skipped does not count."""
        if result.skipped or not result.corpus_losses:
            return
        before = self._sums or [(0.0, 0.0)] * len(result.corpus_losses)
        pairs = zip(before, result.corpus_losses, strict=True)
        self._sums = [(loss + more, tokens + count) for (loss, tokens), (more, count) in pairs]

    def take(self) -> dict[str, Any]:
        """`train_losses` and `counted_tokens` by corpus, of those read; empty where none is told."""
        read = [(name, *sums) for name, sums in zip(self._names, self._sums, strict=False) if sums[1]]
        self._sums = []
        if not read:
            return {}
        return {
            "train_losses": {name: loss / tokens for name, loss, tokens in read},
            "counted_tokens": {name: int(tokens) for name, _, tokens in read},
        }


class RunLog:
    """The log files of one run folder; a resumed run goes on in them.

    flops_per_token: of training, from the model's configuration.
    peak_flops: of one device in the training dtype, or None where it is not known (no MFU then).
    memory_gib: peak memory of this process's device.
    corpora: names of those whose losses a step tells apart.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        tokens_per_step: int,
        samples_per_epoch: int,
        world_size: int,
        flops_per_token: float,
        peak_flops: float | None,
        memory_gib: Callable[[], float],
        resumed_step: int,
        boards: Sequence[MetricWriter] = (),
        corpora: Sequence[str] = (),
    ) -> None:
        self._corpora = CorpusLosses(corpora)
        self._folder = folder
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._samples_per_epoch = samples_per_epoch
        self._world_size = world_size
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._memory_gib = memory_gib
        self._boards = list(boards)
        forget_after(folder / METRICS, resumed_step)
        forget_after(folder / SCORES, resumed_step)
        self._file = (folder / METRICS).open("ab", buffering=0)
        self._cut = False

    def scored(self, step: int, scores: dict[str, float]) -> None:
        """Scores of a checkpoint have come, steps later; from any thread."""
        record = {"step": step, "lm_eval": scores}
        with (self._folder / SCORES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record)) + "\n")
        for board in list(self._boards):
            with contextlib.suppress(Exception):
                board.write(_finite(record))

    def took(self, result: StepResult) -> None:
        """A step was taken, logged or not."""
        self._corpora.add(result)

    def start(self, state: TrainState, timer: StepTimer, scores: Scores) -> None:
        """The evaluation before the first step, as the record of step 0; it has no training loss."""
        _, rest = timer.take()
        counted = {"consumed_samples": state.consumed_samples, "consumed_tokens": state.consumed_tokens}
        self._record({"step": state.step, "total_steps": self._total_steps} | counted | rest, scores)

    def passed_over(self, state: TrainState, scores: Scores | None) -> None:
        """A step of `skip_steps`: its samples are consumed, and there is no loss."""
        counted = {"consumed_samples": state.consumed_samples, "consumed_tokens": state.consumed_tokens}
        skip = {"skipped": True, "skip_reason": "skip_steps"}
        self._record({"step": state.step, "total_steps": self._total_steps} | counted | skip, scores)

    def step(
        self,
        state: TrainState,
        result: StepResult,
        learning_rate: float,
        timer: StepTimer,
        scores: Scores | None = None,
        tokens: int | None = None,
    ) -> None:
        """One logged step of `tokens`. Rates count the steps' own time alone."""
        step_seconds, rest = timer.take()
        rate = (tokens or self._tokens_per_step) / step_seconds if step_seconds else 0.0
        per_device = rate / self._world_size
        record: dict[str, Any] = {
            "step": state.step,
            "loss": result.loss,
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            "loss_scale": result.loss_scale,
            "tokens_per_second": round(rate, 2),
            "tokens_per_second_per_device": round(per_device, 2),
            "mfu": round(per_device * self._flops_per_token / self._peak_flops, 4)
            if self._peak_flops
            else None,
            "step_seconds": round(step_seconds, 6),
            "memory_gib": round(self._memory_gib(), 4),
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "epoch": (state.consumed_samples - 1) // self._samples_per_epoch,
            "total_steps": self._total_steps,
        } | rest
        record |= self._corpora.take()
        if result.skipped:
            record["skipped"] = True
        self._record(record, scores)

    def _record(self, record: dict[str, Any], scores: Scores | None) -> None:
        record |= scores.record() if scores else {}
        record["time"] = round(time.time(), 3)
        finite = _finite(record)
        self._write(json.dumps(finite) + "\n")
        for board in list(self._boards):
            try:
                board.write(finite)
            except Exception as error:  # whatever a board's library raises, training is worth more
                say(f"warning: {type(board).__name__} is given up: {error}")
                self._boards.remove(board)
        say(self._line(record))

    def _write(self, line: str) -> None:
        """A full disk costs lines of the log, not the run; a line cut short is ended by the next."""
        try:
            data = (("\n" if self._cut else "") + line).encode()
            self._cut = self._file.write(data) != len(data)
        except OSError as error:
            self._cut = True
            say(f"warning: {METRICS} was not written: {error}")

    def _line(self, record: dict[str, Any]) -> str:
        width = len(str(self._total_steps))
        parts = [
            f"step {record['step']:>{width}}/{self._total_steps}",
            *_step_parts(record),
        ]
        parts[2:2] = _valid_parts(record)
        if record.get("slowest_rank_excess", 0) > 0.1:
            parts.append(f"rank {record['slowest_rank']} slower by {record['slowest_rank_excess']:.0%}")
        for name, what in (("save_seconds", "saving"), ("eval_seconds", "evaluating")):
            if name in record:
                parts.append(f"{what} {record[name]:.2f} s")
        if record.get("skipped"):
            reason = record.get("skip_reason") or f"loss scale {record['loss_scale']:g}"
            parts.append(f"SKIPPED ({reason})")
        return " | ".join(parts)

    def sync(self) -> None:
        """Puts on the disk what is written so far, as the checkpoint is that goes with it."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def draw(self) -> None:
        """Refreshes loss.png and throughput.png; a plot that fails never stops a run."""
        try:
            from aquila.training.plot import draw_loss, draw_throughput

            records = read_metrics(self._folder / METRICS)
            draw_loss(records, self._folder / "loss.png")
            draw_throughput(records, self._folder / "throughput.png")
        except Exception as error:
            say(f"warning: the plots were not drawn: {error}")

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            with contextlib.suppress(Exception):
                board.close()


def _step_parts(record: dict[str, Any]) -> list[str]:
    """What there is to say of a step that was taken; nothing of step 0."""
    if "loss" not in record:
        return []
    mfu = [] if record["mfu"] is None else [f"mfu {record['mfu']:.1%}"]
    return [
        f"loss {record['loss']:.4f}",
        f"lr {record['learning_rate']:.2e}",
        f"grad {record['grad_norm']:.3f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        *mfu,
        f"{record['step_seconds']:.3f} s/step",
        f"{record['memory_gib']:.2f} GiB",
    ]


def _valid_parts(record: dict[str, Any]) -> list[str]:
    split = [f"valid {record['valid_loss']:.4f}"] if "valid_loss" in record else []
    return split + [f"{name} {loss:.4f}" for name, loss in record.get("valid_losses", {}).items()]


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity are no JSON: a reader in another language would stop at them."""
    return {
        key: _finite(value) if isinstance(value, dict) else _number(value) for key, value in record.items()
    }


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; lines that are none, such as one cut short by a crash, are left out."""
    found = objects(path.read_bytes()) if path.is_file() else []
    return [record for record in found if type(record.get("step")) is int]


def forget_after(path: Path, step: int) -> None:
    """Drops records later than `step`: the resumed run takes those steps again."""
    if not path.is_file():
        return
    records = read_metrics(path)
    # A run that begins anew evaluates anew: what stands for step 0 goes, too.
    kept = [record for record in records if 0 < step >= record["step"]]
    content = path.read_bytes()
    odd = len(content.splitlines()) - len(records)
    if odd:
        say(f"warning: {path}: {odd} line(s) are no records, and are dropped")
    if odd or len(kept) < len(records) or (content and not content.endswith(b"\n")):
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
