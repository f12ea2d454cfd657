"""Protects: the exit status of each kind of end, and the error that a command leaves for who started it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aquila.core import errors
from aquila.core.variables import ERROR_FILE

COMMAND = """
import os, sys
from aquila.core.errors import UserError, run_command
def main():
    assert "AQUILA_ERROR_FILE" not in os.environ  # a child would write its own errors there
    print("Traceback (most recent call last): not ours", file=sys.stderr)
    {}
run_command(main)
"""


def ended(body: str, error_file: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(body)],
        env={**os.environ, ERROR_FILE: str(error_file)},
        capture_output=True,
        text=True,
    )
    return done.returncode, error_file.read_text() if error_file.exists() else ""


def test_a_command_leaves_its_error(tmp_path: Path) -> None:
    file = tmp_path / "error"
    assert ended("return None", file) == (0, "")
    assert ended("return 75", file) == (75, "")
    assert ended("raise UserError('no such data')", file) == (2, "error: no such data")
    status, text = ended("raise ValueError('broken') from KeyError('a cause')", file)
    assert status == 1
    assert "KeyError: 'a cause'" in text
    assert text.rstrip().endswith("ValueError: broken")
    assert "not ours" not in text


def test_an_error_file_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    assert ended("raise UserError('no such data')", tmp_path / "missing" / "error") == (2, "")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; make room on that disk"),
        (errno.EACCES, "Permission denied; let this user read and write there"),
        (errno.EROFS, "Read-only file system; choose a place"),
        (errno.ENAMETOOLONG, "File name too long; choose a shorter name"),
        (errno.EFBIG, "File too large; raise the limit on the size of files"),
        (errno.EEXIST, "File exists; something else is there already"),
    ],
)
def test_what_the_user_can_mend_is_a_message(capsys, number: int, words: str) -> None:
    def main() -> None:
        raise OSError(number, os.strerror(number), "/data/out")

    with pytest.raises(SystemExit) as end:
        errors.run_command(main)
    assert end.value.code == errors.EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(f"error: /data/out: {words}")


def test_other_failures_of_the_system_keep_their_traceback() -> None:
    def main() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/out")

    with pytest.raises(OSError, match="Input/output error"):
        errors.run_command(main)
    assert errors.explain_os_error(OSError("no number")) is None
    assert errors.explain_os_error(OSError(errno.ENOSPC, "full")) == "writing: full; make room on that disk"
    long = errors.explain_os_error(OSError(errno.ENAMETOOLONG, "long", "n" * 5000))
    assert len(long) < 200


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_are_nothing_and_no_file_takes_their_numbers(tmp_path: Path, closed: tuple) -> None:
    body = (
        f"print('said'); file = open({str(tmp_path / 'file')!r}, 'w'); return 0 if file.fileno() > 2 else 9"
    )
    close = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
    command = f'exec {sys.executable} -c "$0" {close}'
    assert subprocess.run(["bash", "-c", command, COMMAND.format(body)], capture_output=True).returncode == 0
    assert (tmp_path / "file").read_text() == ""
