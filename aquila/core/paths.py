"""Which version of the project this is: every node must run the same."""

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The project's folder."""
_SOURCES = (".py", ".cpp", ".h", ".txt")


def source_hash(root: Path = ROOT) -> str:
    """The first digits of a SHA-256 over the names and contents of the package's files: Python, C++, tables.

    Nodes whose C++ differs compute different numbers, so it counts as much as Python does.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in (root / "aquila").rglob("*") if path.suffix in _SOURCES):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def commit(root: Path = ROOT) -> str | None:
    """The commit of these sources, with `+` where files differ from it; None where git does not say."""
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def find_file(name: str) -> Path:
    """A file as named from here, else from the project's folder."""
    return Path(name) if Path(name).exists() or Path(name).is_absolute() else ROOT / name


def find_config_argument(name: str) -> str:
    """CONFIG as a rank in the project's folder will find it: whole where it is a path from here."""
    return str(Path(name).resolve()) if Path(name).is_file() else name
