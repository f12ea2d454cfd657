"""Checkpoint folders on disk: names, checksums, what is whole and what is not."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aquila.core.files import sha256, sync
from aquila.core.text_files import parse_json, read_json

FOLDER = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
_THREADS = 8


def step_folder(step: int) -> str:
    """The checkpoint's name; names sort by step."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints by step, oldest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=step_of)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that everything uses: in `folder`, the highest step whose files agree with its manifest.

    Training, generation, evaluation and conversion all ask here, so they never use different ones. The file
    `latest` is written for people and has no say. Second: what is wrong with each later one, a line each.
    """
    problems: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = find_corruption(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems.append(f"checkpoint {checkpoint} is damaged and is not used: {problem}")
    return None, problems


def set_aside(checkpoints: list[Path]) -> Path:
    """Moves checkpoints of one folder into a new one beside them, `superseded-1`, and returns it."""
    parent = checkpoints[0].parent
    number = 1
    while (target := parent / f"superseded-{number}").exists():
        number += 1
    target.mkdir()
    for checkpoint in checkpoints:
        os.rename(checkpoint, target / checkpoint.name)
    sync(target)
    sync(parent)
    return target


def clear_leftovers(folder: Path) -> None:
    """Removes what a process that was killed left half-written, or half-removed, among checkpoints."""
    for pattern in (".step-*.partial", ".step-*.universal", ".step-*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def find_corruption(folder: Path) -> str | None:
    """What is wrong with the checkpoint `folder`, compared with its manifest; None when it is whole."""
    if not folder.is_dir():
        return f"{folder} does not exist"
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if STATE not in expected:
        return f"{MANIFEST} does not list {STATE}"
    for name, (size, _) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"file {name} is missing"
        if path.stat().st_size != size:
            return f"file {name} has {path.stat().st_size} bytes instead of {size}"
    # Hashing leaves the interpreter free: a terabyte of optimizer state would take one thread half an hour.
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(fingerprint, [folder / name for name in expected])
        for (name, (_, digest)), entry in zip(expected.items(), found, strict=True):
            if entry["sha256"] != digest:
                return f"file {name} is damaged (its checksum differs)"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises `UserError`."""
    return read_json(folder / STATE)
