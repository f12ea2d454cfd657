"""Checkpoint folders on disk: names, checksums, what is whole and what is not."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FOLDER = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
_BLOCK = 1 << 20


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


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint `folder`, compared with its manifest; None when it is whole."""
    if not folder.is_dir():
        return f"{folder} does not exist"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected_files = dict(manifest)
    except (OSError, ValueError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if STATE not in expected_files:
        return f"{MANIFEST} does not list {STATE}"
    for name, expected in expected_files.items():
        path = folder / name
        if not path.is_file():
            return f"file {name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"file {name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if fingerprint(path) != expected:
            return f"file {name} is damaged (its checksum differs)"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text` so that a crash leaves the old content or the new, and both synced."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
