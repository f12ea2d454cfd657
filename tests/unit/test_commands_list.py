"""`python -m aquila`: every command is there, with its own first sentence, and a shell completes it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aquila.__main__ import GROUPS, candidates, missing, options, overview


def test_every_command_is_listed_and_exists(root: Path) -> None:
    assert missing(root) == []
    files = [file for files in GROUPS.values() for file in files]
    assert [file for file in files if not (root / file).is_file()] == []


def test_a_command_that_is_left_out_is_noticed(root: Path, monkeypatch) -> None:
    monkeypatch.setitem(GROUPS, "training", {})
    assert "aquila/plan.py" in missing(root)


def test_the_list_fits_a_terminal(root: Path) -> None:
    lines = overview().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.fullmatch(r"  python -m aquila\.plan  +what fits on which devices", line) for line in lines)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("python -m aquila.pl", ["aquila.plan"]),
        ("python3 -m data_tools.ver", ["data_tools.verify_dataset"]),
        ("python gen", ["generate.py"]),
        ("bash scripts/local_s", ["scripts/local_stop_docker.sh"]),
        ("bash scripts/local_trigger_docker.sh host", ["hostfile"]),
        ("bash scripts/local_trigger_docker.sh hostfile configs/Aquila-t", ["configs/Aquila-tiny.yaml"]),
        ("bash scripts/local_trigger_docker.sh h c aquila-t", ["aquila-tiny"]),
        ("bash scripts/local_trigger_docker.sh h c m e --dry-run a=1 rewarm_f", ["rewarm_from="]),
        ("bash scripts/local_trigger_docker.sh h c m exp lr=", []),
        ("bash scripts/status.sh exp --w", ["--watch"]),
        ("python -m aquila.plan aquila-7b --dev", ["--devices"]),
        ("bash data_tools/make_indexed_dataset.sh --conv", ["--conversation-template"]),
        ("python other.py ", []),
        ("bash ", None),
        ("", []),
    ],
)  # fmt: skip
def test_what_may_come_next(root: Path, line: str, wanted: list[str] | None) -> None:
    found = candidates(line, root)
    assert found == wanted if wanted is not None else "scripts/quickstart.sh" in found


def test_options_are_those_of_the_parser(root: Path) -> None:
    """Read from the source, so that a TAB does not wait for torch; here beside what --help says."""
    done = subprocess.run(
        [sys.executable, "-m", "aquila.plan", "--help"], cwd=root, capture_output=True, text=True, check=True
    )
    assert set(options(root / "aquila" / "plan.py")) == set(re.findall(r"--[a-z][a-z-]+", done.stdout))


def test_bash_completes(root: Path, tmp_path: Path) -> None:
    script = (
        'source <("$PYTHON" -m aquila completion bash); cd /; compopt() { echo "$@"; }\n'
        'COMP_LINE="bash scripts/local_trigger_docker.sh h c m exp max_res" COMP_POINT=64\n'
        '_aquila; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=root,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["-o nospace", "max_restarts="], done.stderr


def test_no_command_needs_its_docstring(root) -> None:
    """`PYTHONOPTIMIZE=2` takes docstrings away."""
    files = [*root.glob("aquila/**/*.py"), *root.glob("data_tools/*.py"), root / "generate.py"]
    assert [path for path in files if "__doc__." in path.read_text(encoding="utf-8")] == []
