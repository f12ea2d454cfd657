"""What a run says of itself: metrics.jsonl, the console, TensorBoard, loss.png. Rank 0 only."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from aquila.training.state import TrainState

METRICS = "metrics.jsonl"


class StepTimer:
    """Seconds of training steps since the last log line, without saves and evaluations.

    The first step of a process compiles and warms caches; it counts only where nothing else does.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._first: float | None = None
        self._started = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        seconds = time.perf_counter() - self._started
        if self._first is None:
            self._first = seconds
        else:
            self._seconds.append(seconds)

    def take(self) -> float:
        """Mean seconds a step since the last call."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else self._first or 0.0
        self._seconds = []
        return mean


class RunLog:
    """The log files of one run folder; a resumed run goes on in them.

    flops_per_token: of training, from the model's configuration.
    peak_flops: of one device in the training dtype, or None where it is not known (no MFU then).
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        tokens_per_step: int,
        world_size: int,
        flops_per_token: float,
        peak_flops: float | None,
        resumed_step: int,
        tensorboard: bool,
    ) -> None:
        self._folder = folder
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._world_size = world_size
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        forget_after(folder / METRICS, resumed_step)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board = _open_board(folder / "tensorboard", resumed_step) if tensorboard else None

    def step(
        self,
        state: TrainState,
        *,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        loss_scale: float,
        step_seconds: float,
        memory_gib: float,
        epoch: int,
        valid_loss: float | None = None,
        skipped: bool = False,
    ) -> None:
        """One logged step. Rates count the steps' own time alone."""
        rate = self._tokens_per_step / step_seconds if step_seconds else 0.0
        per_device = rate / self._world_size
        record: dict[str, Any] = {
            "step": state.step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "loss_scale": loss_scale,
            "tokens_per_second": round(rate, 2),
            "tokens_per_second_per_device": round(per_device, 2),
            "mfu": round(per_device * self._flops_per_token / self._peak_flops, 4)
            if self._peak_flops
            else None,
            "step_seconds": round(step_seconds, 6),
            "memory_gib": round(memory_gib, 4),
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "epoch": epoch,
        }
        if valid_loss is not None:
            record["valid_loss"] = valid_loss
        if skipped:
            record["skipped"] = True
        # NaN and infinity are no JSON: a reader in another language would stop at them.
        finite = {
            key: value if value is not None and math.isfinite(value) else None
            for key, value in record.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if key not in {"step", "epoch"} and value is not None:
                    self._board.add_scalar(key, value, state.step)
        print(self._line(record), flush=True)

    def _line(self, record: dict[str, Any]) -> str:
        width = len(str(self._total_steps))
        parts = [
            f"step {record['step']:>{width}}/{self._total_steps}",
            f"loss {record['loss']:.4f}",
            f"lr {record['learning_rate']:.2e}",
            f"grad {record['grad_norm']:.3f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"{record['step_seconds']:.3f} s/step",
            f"{record['memory_gib']:.2f} GiB",
        ]
        if record["mfu"] is not None:
            parts.insert(5, f"mfu {record['mfu']:.1%}")
        if "valid_loss" in record:
            parts.insert(2, f"valid {record['valid_loss']:.4f}")
        if record.get("skipped"):
            parts.append(f"SKIPPED (not finite, loss scale {record['loss_scale']:g})")
        return " | ".join(parts)

    def draw(self) -> None:
        """Refreshes loss.png; a plot that fails never stops a run."""
        if self._board is not None:
            self._board.flush()
        try:
            from aquila.training.plot import draw_loss

            draw_loss(read_metrics(self._folder / METRICS), self._folder / "loss.png")
        except Exception as error:
            print(f"warning: loss.png was not drawn: {error}", flush=True)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a crash is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def forget_after(path: Path, step: int) -> None:
    """Drops records later than `step`: the resumed run takes those steps again."""
    records = read_metrics(path)
    kept = [record for record in records if record["step"] <= step]
    if path.is_file() and (len(kept) < len(records) or not path.read_bytes().endswith(b"\n")):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(temporary, path)


def _open_board(folder: Path, resumed_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resumed_step + 1)
