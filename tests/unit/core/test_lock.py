"""Protects: one holder at a time; the lock of a dead process is free; a file system without locks."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from aquila.core.lock import HeldError, take_lock


@pytest.mark.parametrize("inherited", [True, False])
def test_a_second_process_is_told_who_holds_it(tmp_path: Path, inherited: bool) -> None:
    path = tmp_path / "lock"
    held = take_lock(path, inherited=inherited)
    if os.fork() == 0:
        try:
            take_lock(path, inherited=inherited)
        except HeldError as error:
            (tmp_path / "told").write_text(str(error))
        os._exit(0)
    os.wait()
    assert (tmp_path / "told").read_text().startswith(f"process {os.getpid()} on ")
    held.close()
    take_lock(path, inherited=inherited).close()


def test_what_a_fork_inherits(tmp_path: Path) -> None:
    """flock's lock lasts until the last process with the open file; a record lock is the process's own."""
    for inherited in (True, False):
        path = tmp_path / f"lock-{inherited}"
        ready, done = os.pipe(), os.pipe()
        holder = os.fork()
        if holder == 0:
            file = take_lock(path, inherited=inherited)
            if os.fork() == 0:
                os.write(ready[1], b"r")
                os.read(done[0], 1)
            os._exit(file.closed)
        os.waitpid(holder, 0)
        os.read(ready[0], 1)
        try:
            if inherited:
                with pytest.raises(HeldError):
                    take_lock(path)
            else:
                take_lock(path, inherited=False).close()
        finally:
            os.write(done[1], b"d")


def test_without_locks_others_are_warned_of(tmp_path: Path, monkeypatch) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    told: list[str] = []
    (tmp_path / "lock").write_text("process 1 on another-host\n")
    take_lock(tmp_path / "lock", told.append)
    assert "the last one here was process 1 on another-host" in told[0]


def test_another_error_is_not_taken_for_a_holder(tmp_path: Path, monkeypatch) -> None:
    def broken(file: object, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"):
        take_lock(tmp_path / "lock")
