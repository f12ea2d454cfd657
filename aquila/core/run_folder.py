"""The folders of an experiment: which version a launch continues, and the place of every launch file.

checkpoints_out/EXP/VERSION/
    metrics.jsonl, checkpoints/...            written by the training process
    logs/HOST-rank-0003.log                   standard output and error of a rank
    launch/node-00.json                       what the agent of a node says of it
    launch/status.json                        what the controller says of the run
    launch/ranks/                             one record per finished rank
"""

import contextlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from aquila.core.checkpoints import FOLDER, list_checkpoints
from aquila.core.errors import UserError
from aquila.core.text_files import parse_json

_EXPERIMENT = re.compile(r"[\w][\w.+-]*$")


def check_experiment(name: str) -> str:
    """The name of an experiment, which becomes a folder. Raises `UserError` when it cannot be one."""
    if not _EXPERIMENT.match(name) or name in (".", ".."):
        raise UserError(
            f"experiment name {name!r} cannot be a folder's name; use letters, digits, '.', '_', '+' and '-'"
        )
    return name


def experiment_dir(root: Path, experiment: str) -> Path:
    return root / "checkpoints_out" / experiment


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
    after the hour, `2024123117`, then `2024123117-2`.
    """
    existing = versions(folder)
    if resume == "auto":
        for run_dir in reversed(existing):
            if has_checkpoint(run_dir):
                return run_dir.name, True
    hour = time.strftime("%Y%m%d%H")
    taken = {path.name for path in existing}
    name, count = hour, 1
    while name in taken:
        count += 1
        name = f"{hour}-{count}"
    return name, False


def write_json(path: Path, data: Any) -> None:
    """Replaces `path` with `data`; a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file)
            os.fchmod(file.fileno(), 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, None when there is none."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
