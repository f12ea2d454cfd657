"""Files on disk: written whole or not at all, synced, and named by their content."""

import hashlib
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

_BLOCK = 1 << 20


class replacing:  # noqa: N801, read as a verb: with replacing(path) as file
    """A binary file that takes the place of `path` when the block ends well, and vanishes otherwise.

    A reader sees the old content or the new, never half of one. `durable` waits until the disk has it: a
    crash of the machine, too, leaves the one or the other.
    """

    def __init__(self, path: Path, durable: bool = True) -> None:
        self.path, self.temporary, self.durable = path, temporary_name(path), durable

    def __enter__(self) -> BinaryIO:
        self.file: BinaryIO = open(self.temporary, "wb")
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.durable:
                sync_file(self.file)
            self.file.close()
            if kind is None:
                os.replace(self.temporary, self.path)
                if self.durable:
                    sync(self.path.parent)
        finally:
            self.file.close()
            self.temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Replaces `path` by `text`, in UTF-8. See `replacing`."""
    with replacing(path, durable) as file:
        file.write(text.encode())


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path`, this thread's own."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident() & 0xFFFF:x}.tmp")


def sync_file(file: BinaryIO) -> None:
    """Everything written so far to an open file is on the disk when this returns."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits. Lets other threads run meanwhile."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
