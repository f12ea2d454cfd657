"""One run at a time in a run folder."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from aquila.errors import UserError

_held: list[IO[str]] = []
"""Locks last as long as their open files: to the end of this process, however it ends."""


def lock_run(run_dir: Path) -> None:
    """Makes `run_dir` and keeps it locked while this process lives.

    The kernel drops the lock of a dead process, so a stale one cannot be. Raises `UserError` naming
    the holder when another run has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{run_dir} is in use by {holder}: stop that run, or train under another experiment name"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held.append(file)
