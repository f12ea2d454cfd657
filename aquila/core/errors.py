"""The errors a user sees, and the exit status that each one means.

0 done, 1 anything unforeseen, 2 the user's input is wrong, 75 stopped on request with a checkpoint
saved (`EX_TEMPFAIL` of sysexits.h: run the same command again).
"""

import contextlib
import signal
import sys
from collections.abc import Callable

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75


class UserError(ValueError):
    """What the user gave is wrong. The message says what, where, and what to do about it."""

    exit_status = EXIT_USER_ERROR


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with its status; a `UserError` becomes one clear message."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
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
    sys.exit(status or 0)
