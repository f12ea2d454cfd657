"""What the terminal shows of a run: a live bar, or plain lines where there is no terminal."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 1.0


def describe(metric: dict[str, Any]) -> str:
    """'step 10/500  loss 5.4321  lr 2.0e-04  1,234 tokens/s' of what the metric holds."""
    total = metric.get("total_steps")
    parts = [f"step {metric.get('step', '?')}" + (f"/{total}" if total else "")]
    if (loss := metric.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (rate := metric.get("learning_rate")) is not None:
        parts.append(f"lr {rate:.2e}")
    if (speed := metric.get("tokens_per_second")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if (mfu := metric.get("mfu")) is not None:
        parts.append(f"MFU {100 * mfu:.1f} %")
    if (memory := metric.get("memory_gib")) is not None:
        parts.append(f"{memory:.1f} GiB")
    return "  ".join(parts)


class Display:
    """Shows metrics as they come. A context manager."""

    def __init__(self, total_steps: int | None = None) -> None:
        self.total = total_steps
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.task = None
        self.pending: str | None = None
        self.last_plain = 0.0

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=self.console,
            )
            self.progress.start()
            self.task = self.progress.add_task("starting", total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()
        self._flush()

    def _flush(self) -> None:
        if self.pending:
            print(self.pending, flush=True)
            self.pending = None

    def metric(self, metric: dict[str, Any]) -> None:
        if "step" not in metric:
            return
        if self.total and "total_steps" not in metric:
            metric = {**metric, "total_steps": self.total}
        if self.progress:
            total = metric.get("total_steps")
            self.progress.update(
                self.task, completed=metric["step"], total=total, description=describe(metric)
            )
            return
        self.pending = describe(metric)
        if time.monotonic() - self.last_plain >= PLAIN_INTERVAL:
            self.last_plain = time.monotonic()
            self._flush()

    def text(self, text: str, error: bool = False) -> None:
        if self.progress:
            self.console.print(text, style="red" if error else None, markup=False)
        else:
            self._flush()
            print(text, file=sys.stderr if error else sys.stdout, flush=True)
