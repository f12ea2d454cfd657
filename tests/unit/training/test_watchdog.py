"""Who stands still, and who merely waits."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from traceback import FrameSummary

import pytest

from aquila.training import watchdog
from aquila.training.watchdog import waits_for_others

ALONE = """
import pathlib, sys, time
from aquila.training.watchdog import Watchdog
watchdog = Watchdog(pathlib.Path(sys.argv[1]), 0, 1, 1.0)
for _ in range(8):  # twice the timeout, but alive
    time.sleep(0.25)
    watchdog.alive()
print("alive", flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize(
    ("place", "waits"),
    [
        (("/env/torch/distributed/distributed_c10d.py", "all_reduce"), True),
        (("/env/deepspeed/comm/comm.py", "barrier"), True),
        (
            ("/home/aquila/training/deepspeed/engine.py", "gather"),
            True,
        ),  # reads from a device that is in a collective
        (("/home/aquila/backend/cuda.py", "synchronize"), True),
        (("/home/aquila/training/deepspeed/zero_step.py", "step"), True),
        (("/home/aquila/data/batches.py", "__next__"), False),
        (("/env/other/io.py", "gather"), False),
    ],
)
def test_waiting_is_told_from_standing_still(place: tuple[str, str], waits: bool) -> None:
    file, name = place
    stack = [FrameSummary("/home/aquila/training/trainer.py", 1, "run"), FrameSummary(file, 2, name)]
    assert waits_for_others(stack) is waits


def test_a_machine_that_was_frozen_is_no_fault(tmp_path: Path, root: Path) -> None:
    """Stopped for twice the timeout as a whole, then going on: no verdict on what it could not do."""
    code = ALONE.replace("for _ in range(8):", "print('go', flush=True)\nfor _ in range(8):")
    code = code.replace("time.sleep(3600)", "time.sleep(0.5)\nwatchdog.close()")
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "go\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0, rest
    assert rest == "alive\n"


def test_one_that_is_alive_is_left_alone_and_one_that_is_not_is_ended(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout.startswith("alive\n")
    assert "Stuck: rank 0 at <string>:9 in <module>" in done.stdout


def test_the_files_it_knows_are_there(root):
    own = [part for part in watchdog._WAITING if part.startswith("aquila/")]
    assert own
    assert all((root / part).is_file() for part in own)
