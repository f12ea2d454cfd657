"""Around one rank: its log file and its true exit status.

torchrun turns every failure into status 1 and forgets signals, so this small process (no torch) starts
the rank, sends its output to `logs/HOST-rank-NNNN.log` and leaves a record of how it ended, with the
error in the rank's own words where it could still write them. Signals for
the process group reach the rank itself; this process only waits.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from aquila.core.errors import EXIT_STOPPED
from aquila.core.run_folder import write_json
from aquila.core.variables import ERROR_FILE

_PR_SET_PDEATHSIG = 1
RANK_SPEC = "AQUILA_RANK_ORDERS"
"""The variable that holds, as JSON: node, logs, records, generation, command."""


def die_with_parent(kill: int = signal.SIGKILL) -> None:
    """Asks the kernel to send this process `kill` when its parent ends (Linux; elsewhere nothing)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, kill)


def record_path(records: Path, generation: int, rank: int) -> Path:
    return records / f"{generation:03d}-{rank:05d}.json"


def error_path(records: Path, generation: int, rank: int) -> Path:
    """Where a rank leaves the error that ended it."""
    return records / f"{generation:03d}-{rank:05d}.error"


def log_path(logs: Path, node: str, rank: int) -> Path:
    return logs / f"{node}-rank-{rank:04d}.log"


def main() -> int:
    # Told by the environment: torchrun's own argument parser takes offence at other people's options.
    orders = json.loads(os.environ.pop(RANK_SPEC))
    node, logs, records = orders["node"], Path(orders["logs"]), Path(orders["records"])
    generation, command = orders["generation"], orders["command"]

    die_with_parent()
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(stop, lambda *_: None)  # a handler, not SIG_IGN: that the rank would inherit
    rank = int(os.environ["RANK"])
    path = log_path(logs, node, rank)
    error_file = error_path(records, generation, rank)
    error_file.unlink(missing_ok=True)
    with path.open("ab", buffering=0) as log:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        log.write(f"--- {started} rank {rank} on {node}, start {generation}\n".encode())
        offset = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
            env={**os.environ, ERROR_FILE: str(error_file)},
        )
        status = process.wait()
    record = {
        "rank": rank,
        "status": status,
        "time": time.time(),
        "node": node,
        "log": str(path),
        "log_offset": offset,
        "own_error": _read(error_file),
    }
    write_json(record_path(records, generation, rank), record)
    if status == EXIT_STOPPED:
        return 0  # torchrun would kill the other ranks, which are saving still
    return status if status >= 0 else 128 - status


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
