"""One run at a time in a run folder."""

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from aquila.core.errors import UserError
from aquila.training.console import say

_held: list[IO[str]] = []
"""Locks last as long as their open files: to the end of this process, however it ends."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What a file system without locks answers: Lustre mounted without `flock`, some object stores."""


def lock_run(run_dir: Path) -> None:
    """Makes `run_dir` and keeps it locked while this process lives.

    The kernel drops the lock of a dead process, so a stale one cannot be; over NFS and other shared disks
    the server does, for a process of any host. Where the file system has no locks, a live process of this
    host is recognized by what it wrote, and a warning tells that one of another host is not. Raises
    `UserError` naming the holder when another run has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("a+", encoding="utf-8")
    file.seek(0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read().strip() or "another process"
        file.close()
        raise _in_use(run_dir, holder) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            raise
        holder = file.read().strip()
        if _lives_here(holder):
            file.close()
            raise _in_use(run_dir, holder) from None
        say(
            f"warning: the file system of {run_dir} has no locks ({error.strerror}): a second run in this "
            f"folder from another host would not be noticed; the last one here was {holder or 'none'}"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held.append(file)


def _in_use(run_dir: Path, holder: str) -> UserError:
    return UserError(
        f"{run_dir} is in use by {holder}: stop that run, or train under another experiment name"
    )


def _lives_here(holder: str) -> bool:
    """Whether 'process P on HOST' is of this host, alive, and one of our runs."""
    _, _, rest = holder.partition("process ")
    number, _, host = rest.partition(" on ")
    if host != socket.gethostname() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process is a process
    with contextlib.suppress(OSError):  # the number may have gone to something else since
        return b"aquila" in Path(f"/proc/{number}/cmdline").read_bytes()
    return True
