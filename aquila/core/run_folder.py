"""The folders of an experiment: which version a launch continues, and the place of every launch file.

checkpoints_out/EXP/VERSION/
    metrics.jsonl, checkpoints/...            written by the training process
    logs/HOST-rank-0003.log                   standard output and error of a rank
    launch/node-00.json                       what the agent of a node says of it
    launch/status.json                        what the controller says of the run
    launch/ranks/                             one record per finished rank
"""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from aquila.core.checkpoints import FOLDER, list_checkpoints
from aquila.core.errors import UserError
from aquila.core.files import write_atomically
from aquila.core.text_files import parse_json

STATUS = Path("launch") / "status.json"
"""What the controller says of a run, in its folder."""
_EXPERIMENT = re.compile(r"[\w][\w.+-]*")
_LONGEST = 200
"""Bytes of a folder's name: file systems take 255, and names of files are made from it."""


def check_experiment(name: str, what: str = "experiment name") -> str:
    """The name of an experiment, or of `what`, which becomes a folder. Raises `UserError` when it cannot."""
    if not _EXPERIMENT.fullmatch(name) or name in (".", ".."):
        raise UserError(
            f"{what} {name!r} cannot be a folder's name; use letters, digits, '.', '_', '+' and '-'"
        )
    if len(os.fsencode(name)) > _LONGEST:
        raise UserError(f"{what} {name[:20]!r}... has more than {_LONGEST} bytes; take a shorter one")
    return name


def experiment_dir(root: Path, experiment: str) -> Path:
    return root / "checkpoints_out" / experiment


def first_unwritable(folder: Path) -> Path | None:
    """What a run could not write of a version's folder, checkpoints left aside; None where it can."""
    if not folder.exists():
        return None
    for parent, folders, files in os.walk(folder):
        if Path(parent).name == FOLDER:
            folders.clear()
            files = []
        for path in (Path(parent), *(Path(parent, name) for name in files)):
            if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0), follow_symlinks=True):
                return path
    return None


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a version holds finished checkpoints. That they are whole is checked when one is loaded."""
    return bool(list_checkpoints(run_dir / FOLDER))


def versions(folder: Path) -> list[Path]:
    """The versions of an experiment, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and re.match(r"\d{10}(-\d+)?$", path.name)]
    return sorted(found, key=lambda path: _version_key(path.name))


def _version_key(name: str) -> tuple[str, int]:
    hour, _, suffix = name.partition("-")
    return hour, int(suffix or 1)


def choose_version(folder: Path, resume: str) -> tuple[str, bool]:
    """The version a launch writes to, and whether it continues one.

    `resume` "auto" continues the newest version that has a checkpoint. Otherwise a new version is named
    after the hour, `2024123117`, then `2024123117-2`. Names only grow: where the clock or its zone has gone
    back, the newest name is counted on.
    """
    existing = versions(folder)
    if resume == "auto":
        for run_dir in reversed(existing):
            if has_checkpoint(run_dir):
                return run_dir.name, True
    hour = time.strftime("%Y%m%d%H")
    if not existing or _version_key(existing[-1].name) < (hour, 1):
        return hour, False
    newest, count = _version_key(existing[-1].name)
    return f"{newest}-{count + 1}", False


def launch_number(folder: Path) -> int:
    """The number of an experiment's next launch: one more than any that its versions tell of."""
    return 1 + max((_launch(path) for path in versions(folder)), default=0)


def newest_launch(folder: Path) -> Path | None:
    """The version that was launched last, by the launches' own numbers; no clock has a say."""
    found = [path for path in versions(folder) if (path / STATUS).is_file()]
    return max(found, key=_launch, default=None)


def _launch(run_dir: Path) -> int:
    number = (read_json(run_dir / STATUS) or {}).get("launch", 0)
    return number if isinstance(number, int) else 0


def write_json(path: Path, data: Any) -> None:
    """Replaces `path` with `data`; a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(data), durable=False)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, None when there is none."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
