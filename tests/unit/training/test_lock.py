"""One run at a time in a folder, and no stale lock."""

import subprocess
import sys
from pathlib import Path

import pytest

from aquila.errors import UserError
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
