"""One process at a time: locks that the kernel drops with their holder, so that none is ever stale."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What a file system without locks answers: Lustre mounted without `flock`, some object stores."""


class HeldError(Exception):
    """Another process has the lock. The message is what it wrote of itself."""


def take_lock(
    path: Path, warn: Callable[[str], None] = lambda text: None, *, inherited: bool = True
) -> IO[str]:
    """The locked file; closing it, or the end of this process in any way, gives the lock back.

    Over NFS and other shared disks the server drops the lock of a dead process, whatever its host. Where the
    file system has no locks, a live process of this host is recognized by what it wrote, and `warn` is told
    that one of another host is not. inherited: processes forked later hold the lock, too. Raises `HeldError`,
    and `OSError` when the file cannot be opened.
    """
    file = path.open("a+", encoding="utf-8")
    file.seek(0)
    try:
        (fcntl.flock if inherited else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = file.read().strip()
        # lockf says EACCES or EAGAIN, flock EWOULDBLOCK.
        held = error.errno in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
        if held or error.errno not in _NO_LOCKS or _lives_here(holder):
            file.close()
            if held or error.errno in _NO_LOCKS:
                raise HeldError(holder or "another process") from None
            raise
        warn(
            f"the file system of {path.parent} has no locks ({error.strerror}): a second process from "
            f"another host would not be noticed; the last one here was {holder or 'none'}"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _lives_here(holder: str) -> bool:
    """Whether 'process P on HOST' is of this host, alive, and one of ours."""
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
