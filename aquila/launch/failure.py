"""Which rank failed first, and the part of its log a person needs."""

import re
import signal
from pathlib import Path
from typing import Any

from aquila.core.errors import EXIT_STOPPED, EXIT_USER_ERROR

LINES_SHOWN = 40
_LOOK_BACK = 256 * 1024
_CONSEQUENCE = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|Socket Timeout|"
    r"NCCL.*(remote|watchdog)|EI0002|EI0006|507046|HCCL.*time(d )?out|"
    r"connectFullMesh|store->get|DistNetworkError|DistStoreError",
    re.IGNORECASE,
)


def is_failure(status: int) -> bool:
    return status not in (0, EXIT_STOPPED)


def describe_status(status: int) -> str:
    """'exit status 1', 'killed by SIGKILL (out of memory?)'."""
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"killed by {name}" + (" (out of memory?)" if status == -signal.SIGKILL else "")


def record_error(record: dict[str, Any]) -> str:
    """What ended a rank: in its own words, else from its log, all that a signal or an abort leaves."""
    if own := record.get("own_error"):
        return _shortened(own.splitlines())
    return error_text(Path(record["log"]), record["log_offset"])


def error_text(log: Path, offset: int = 0) -> str:
    """The end of a rank's log from the error on: the last traceback or 'error:' line, else its last lines."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(offset, size - _LOOK_BACK))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"(log {log} cannot be read: {error})"
    starts = [
        i
        for i, line in enumerate(lines)
        if "Traceback (most recent call last)" in line or "error:" in line[:8]
    ]
    if starts and "Traceback" in lines[starts[-1]]:
        chained = [i for i in starts if starts[-1] - i < LINES_SHOWN and "Traceback" in lines[i]]
        shown = lines[chained[0] :]
    elif starts:
        shown = lines[starts[-1] :]
    else:
        shown = lines[-15:]
    return _shortened(shown) or "(the log is empty)"


def _shortened(lines: list[str]) -> str:
    if len(lines) > LINES_SHOWN:
        lines = [*lines[:10], f"    ... {len(lines) - LINES_SHOWN} lines left out ...", *lines[-30:]]
    return "\n".join(line for line in lines if line.strip())


def first_failure(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The record of the rank that failed first.

    A failing rank takes its peers along within moments, and clocks of hosts differ a little: among the
    failures of the first seconds a mistake of the user's or an error that is not merely a lost
    connection comes before one that is.
    """
    failed = sorted((r for r in records if is_failure(r["status"])), key=lambda r: r["time"])
    if not failed:
        return None
    early = [r for r in failed if r["time"] - failed[0]["time"] < 10]

    def order(record: dict[str, Any]) -> tuple[bool, bool, float]:
        lost_connection = record["status"] > 0 and bool(_CONSEQUENCE.search(record.get("error", "")))
        terminated = record["status"] == -signal.SIGTERM
        user = record["status"] == EXIT_USER_ERROR
        return (not user, terminated or lost_connection, record["time"])

    return min(early, key=order)


def run_status(statuses: list[int]) -> int:
    """One exit status for all ranks: 0 done, 75 stopped with a checkpoint, 2 user's mistake, else 1."""
    failed = [status for status in statuses if is_failure(status)]
    if failed:
        return EXIT_USER_ERROR if EXIT_USER_ERROR in failed else 1
    return EXIT_STOPPED if EXIT_STOPPED in statuses else 0
