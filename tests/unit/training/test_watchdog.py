"""Who stands still, and who merely waits."""

import subprocess
import sys
from pathlib import Path
from traceback import FrameSummary

import pytest

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


def test_one_that_is_alive_is_left_alone_and_one_that_is_not_is_ended(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout.startswith("alive\n")
    assert "Stuck: rank 0 at <string>:9 in <module>" in done.stdout
