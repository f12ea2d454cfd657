"""Protects: the rank that is blamed, the words of its log that are shown, the run's exit status."""

import signal
from pathlib import Path
from typing import Any

from aquila.launch import failure


def record(rank: int, status: int, time: float, error: str = "") -> dict[str, Any]:
    return {"rank": rank, "status": status, "time": time, "error": error}


def test_the_earliest_failure_is_blamed() -> None:
    records = [record(0, 1, 5.0, "ValueError"), record(1, 1, 4.0, "KeyError"), record(2, 0, 1.0)]
    assert failure.first_failure(records)["rank"] == 1


def test_a_lost_connection_is_a_consequence() -> None:
    records = [
        record(0, 1, 4.0, "RuntimeError: Connection closed by peer [10.0.0.2]:1"),
        record(1, -9, 4.5),
        record(2, -signal.SIGTERM, 4.1),
    ]
    assert failure.first_failure(records)["rank"] == 1


def test_a_user_s_mistake_comes_before_what_it_brings_about() -> None:
    records = [record(0, 1, 4.0, "RuntimeError: broken"), record(1, 2, 4.2, "error: no such data")]
    assert failure.first_failure(records)["rank"] == 1


def test_success_and_a_saved_stop_are_no_failures() -> None:
    assert failure.first_failure([record(0, 0, 1.0), record(1, 75, 1.0)]) is None


def test_run_status() -> None:
    assert failure.run_status([0, 0]) == 0
    assert failure.run_status([0, 75]) == 75
    assert failure.run_status([75, 1]) == 1
    assert failure.run_status([-9, 2]) == 2
    assert failure.run_status([-11, 75]) == 1


def test_a_signal_is_named() -> None:
    assert "SIGKILL" in failure.describe_status(-9)
    assert "out of memory" in failure.describe_status(-9)
    assert failure.describe_status(1) == "exit status 1"


def test_the_last_traceback_is_shown_without_what_came_before(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("step 1\nTraceback (most recent call last):\n  File x\nValueError: this\n")
    assert failure.error_text(log).startswith("Traceback")
    assert failure.error_text(log).endswith("ValueError: this")


def test_an_earlier_start_s_error_is_not_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: old\n")
    offset = log.stat().st_size
    with log.open("a") as file:
        file.write("plain words\n")
    assert failure.error_text(log, offset) == "plain words"


def test_a_long_error_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: begins\n" + "\n".join(f"line {i}" for i in range(500)) + "\nends\n")
    lines = failure.error_text(log).splitlines()
    assert lines[0] == "error: begins"
    assert lines[-1] == "ends"
    assert len(lines) <= failure.LINES_SHOWN + 1


def test_a_rank_s_own_words_come_before_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback (most recent call last):\nOSError: an exporter's, caught\n")
    left = {
        "log": str(log),
        "log_offset": 0,
        "own_error": "Traceback (most recent call last):\nKeyError: 1\n",
    }
    assert failure.record_error(left).splitlines()[-1] == "KeyError: 1"
    assert failure.record_error({**left, "own_error": None}).endswith("an exporter's, caught")
    shown = failure.record_error({**left, "own_error": "\n".join(map(str, range(1000)))}).splitlines()
    assert len(shown) <= failure.LINES_SHOWN + 1
    assert (shown[0], shown[-1]) == ("0", "999")
