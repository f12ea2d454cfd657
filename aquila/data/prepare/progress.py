"""Progress of a long command: a bar in a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import TextIO

_BAR = 24
_TERMINAL_SECONDS = 0.1
_PLAIN_SECONDS = 10.0


class Progress:
    """Documents/s, MB/s of text, tokens and time left, from what has been done so far."""

    def __init__(self, total_bytes: int, done_bytes: int = 0, stream: TextIO = sys.stderr) -> None:
        self._total = max(total_bytes, 1)
        self._skipped = done_bytes
        self._stream = stream
        self._terminal = stream.isatty()
        self._started = self._shown = time.monotonic()

    def update(self, done_bytes: int, documents: int, text_bytes: int, *, all_tokens: int) -> None:
        """`documents`, `text_bytes`: of this run; `done_bytes`, `all_tokens`: with the resumed ones."""
        now = time.monotonic()
        if now - self._shown < (_TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS):
            return
        self._shown = now
        seconds = max(now - self._started, 1e-9)
        share = min(done_bytes / self._total, 1.0)
        pace = (done_bytes - self._skipped) / seconds
        left = (self._total - done_bytes) / pace if pace > 0 else 0.0
        figures = (
            f"{share:4.0%}  {documents / seconds:,.0f} documents/s  {text_bytes / seconds / 1e6:.1f} MB/s  "
            f"{all_tokens:,} tokens  {_clock(left)} left"
        )
        if self._terminal:
            full = round(share * _BAR)
            self._stream.write(f"\r\x1b[K[{'#' * full}{'.' * (_BAR - full)}] {figures}")
        else:
            self._stream.write(figures.strip() + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Clears the bar."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
