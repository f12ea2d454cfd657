"""One run at a time in a folder, and no stale lock."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from aquila.core.errors import UserError
from aquila.training.lock import lock_run

HOLD = """
import pathlib, sys
from aquila.training.lock import lock_run
lock_run(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_is_refused_and_a_dead_one_is_no_obstacle(tmp_path: Path, root: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
        lock_run(run)
    holder.kill()
    holder.wait()
    lock_run(run)


def test_without_locks_a_live_run_of_this_host_is_refused_and_others_are_warned_of(
    tmp_path: Path, root: Path, monkeypatch, capsys
) -> None:
    """As on Lustre mounted without `flock`: the holder's own words have to do."""
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run)]
    holder = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"

    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
        lock_run(run)
    holder.kill()
    holder.wait()
    lock_run(run)
    assert f"the last one here was process {holder.pid} on " in capsys.readouterr().out
    (run / ".lock").write_text("process 1 on another-host\n")
    lock_run(run)
    assert "from another host would not be noticed" in capsys.readouterr().out
