"""Words for the person who watches."""

import contextlib
import sys


def say(text: str) -> None:
    """Prints a line at once. A log that cannot be written, on a full disk, is no reason to stop training."""
    try:
        print(text, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            # What could not be written would be tried again at exit, and turn a good status into a bad one.
            sys.stdout = open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False)  # noqa: SIM115
