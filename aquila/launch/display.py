"""What the terminal shows of a run: one live line that leaves nothing behind, or plain lines elsewhere."""

import os
import shutil
import sys
import textwrap
import time
from typing import Any, TextIO

PLAIN_INTERVAL = 1.0
_BAR = 12
_CLEAR = "\r\x1b[K"
_RED = "\x1b[31m"
_PLAIN = "\x1b[0m"


def is_terminal(stream: TextIO) -> bool:
    """Whether a line there can be redrawn."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal behind `stream`; None for a file or a pipe, where nothing wraps."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def red(text: str, stream: TextIO) -> str:
    """`text` in red on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    colours = is_terminal(stream) and not os.environ.get("NO_COLOR")
    return f"{_RED}{text}{_PLAIN}" if colours else text


def boxed(title: str, lines: list[str], width: int | None) -> str:
    """`lines` under a title, with a bar at their left; longer ones are wrapped at `width`."""
    edge = width or 80
    inside = [
        part
        for line in lines
        for part in (textwrap.wrap(line, edge - 2, subsequent_indent="    ") if width else [line]) or [""]
    ]
    head = f"+-- {title} "
    return "\n".join(
        [head.ljust(edge, "-"), *(f"| {line}".rstrip() for line in inside), "+" + "-" * (edge - 1)]
    )


def describe(metric: dict[str, Any]) -> str:
    """'step 10/500  loss 5.4321  lr 2.0e-04  1,234 tokens/s' of what the metric holds."""
    return "  ".join(_parts(metric))


def _parts(metric: dict[str, Any]) -> list[str]:
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
    return parts


def progress_line(metric: dict[str, Any], width: int) -> str:
    """The metric with a bar and the time that is left, in one line shorter than `width`."""
    step, *others = _parts(metric)
    total = metric.get("total_steps")
    if total:
        full = _BAR * metric["step"] // total
        step = f"{step} [{'#' * full}{'.' * (_BAR - full)}]"
        if metric.get("step_seconds"):
            others.append(f"{_duration((total - metric['step']) * metric['step_seconds'])} left")
            others.insert(1, others.pop())
    line = step
    for part in others:
        if len(line) + 2 + len(part) < width:
            line = f"{line}  {part}"
    return line[: width - 1]


def _duration(seconds: float) -> str:
    """'4 s', '12 min', '3 h 20 min', '5 days'."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 2880 else f"{minutes / 1440:.0f} days"


class Display:
    """Shows metrics as they come. A context manager."""

    def __init__(self, total_steps: int | None = None) -> None:
        self.total = total_steps
        self.live = is_terminal(sys.stdout)
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.pending: str | None = None
        self.last_plain = 0.0

    def __enter__(self) -> "Display":
        if self.live:
            self._draw("starting the ranks; their logs tell how far they are")
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Takes the live line away; a plain line that waits is printed."""
        if self.live:
            self._write(_CLEAR)
        if self.pending:
            self._write(self.pending + "\n")
            self.pending = None

    def metric(self, metric: dict[str, Any]) -> None:
        if "step" not in metric:
            return
        if self.total and "total_steps" not in metric:
            metric = {**metric, "total_steps": self.total}
        if metric.get("loss") is not None:  # an evaluation before the first step has none
            self.first = self.first or metric
            self.last = metric
        if self.live:
            self._draw(progress_line(metric, width_of(sys.stdout) or 80))
            return
        self.pending = describe(metric)
        if time.monotonic() - self.last_plain >= PLAIN_INTERVAL:
            self.last_plain = time.monotonic()
            self.clear()

    def text(self, text: str, error: bool = False) -> None:
        """Words that stay, above the live line."""
        self.clear()
        stream = sys.stderr if error else sys.stdout
        print(red(text, stream) if error else text, file=stream, flush=True)

    def _draw(self, line: str) -> None:
        self._write(_CLEAR + line)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
