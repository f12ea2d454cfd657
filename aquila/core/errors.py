"""The errors a user sees, and the exit status that each one means.

0 done, 1 anything unforeseen, 2 the user's input is wrong, 75 stopped on request with a checkpoint
saved (`EX_TEMPFAIL` of sysexits.h: run the same command again).
"""

import contextlib
import errno
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
    open_closed_streams()
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(error_file, f"error: {error}")
        status = error.exit_status
    except BrokenPipeError:  # the reader of our output has left: `... | head`
        sys.stderr.close()
        status = EXIT_FAILURE
    except OSError as error:
        if (message := explain_os_error(error)) is None:
            _leave(error_file, "".join(traceback.format_exception(error)))
            raise
        print(f"error: {message}", file=sys.stderr)
        _leave(error_file, f"error: {message}")
        status = EXIT_USER_ERROR
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


def open_closed_streams() -> None:
    """Lets standard streams that were closed before the start (`>&-`) read and write nothing.

    Else the next file to be opened would get the number of standard output, and what is printed into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within this user's quota",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`), or write to another file system",
    errno.EACCES: "let this user read and write there, or choose another place",
    errno.EPERM: "let this user read and write there, or choose another place",
    errno.EROFS: "choose a place that is not mounted read-only",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file is where a folder must be; choose another place",
    errno.EISDIR: "a folder is where a file must be; choose another place",
    errno.EEXIST: "something else is there already; choose another place",
    errno.ELOOP: "the links there lead in a circle; mend them",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "the system has too many open files; close some",
}


def explain_os_error(error: OSError) -> str | None:
    """What is wrong, where and what to do, of an error that its user can mend; None for any other."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    where = " to ".join(name if len(name) < 200 else f"{name[:80]}...{name[-20:]}" for name in names)
    return f"{where or 'writing'}: {error.strerror}; {remedy}"


def _leave(path: str | None, text: str) -> None:
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
