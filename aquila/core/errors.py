"""The errors a user sees, and the exit status that each one means.

0 done, 1 anything unforeseen, 2 the user's input is wrong, 75 stopped on request with a checkpoint
saved (`EX_TEMPFAIL` of sysexits.h: run the same command again).
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from aquila.core.variables import ERROR_FILE

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75


class UserError(ValueError):
    """What the user gave is wrong. The message says what, where, and what to do about it."""

    exit_status = EXIT_USER_ERROR


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with its status; a `UserError` becomes one clear message.

    What ends it is written to `ERROR_FILE`, too, where that is set: the words of the error itself, which its
    log has among much else.
    """
    error_file = os.environ.pop(ERROR_FILE, None)  # ours alone, not of what we start
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(error_file, f"error: {error}")
        status = error.exit_status
    except BrokenPipeError:  # the reader of our output has left: `... | head`
        sys.stderr.close()
        status = EXIT_FAILURE
    except KeyboardInterrupt:
        # Without a traceback, and by the signal itself, so that a shell's loop around the command ends, too.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except Exception as error:
        _leave(error_file, "".join(traceback.format_exception(error)))
        raise
    sys.exit(status or 0)


def _leave(path: str | None, text: str) -> None:
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
