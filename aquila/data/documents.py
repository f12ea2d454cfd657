"""The documents of an indexed dataset, read a part at a time by positioned reads."""

import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np

from aquila.core.errors import UserError
from aquila.data.indexfile import HEADER, Index, bin_path, idx_path, read_index


class Documents:
    """Documents 0, 1, ... of `PREFIX.bin` by `PREFIX.idx`; each sequence of the index is one.

    A random read through a memory map faults in page after page, each with read-ahead around it, and ends the
    process where the file has been cut; a positioned read fetches exactly what a sample needs, or fails.
    Raises `UserError` for damaged files, here and later.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.index: Index = read_index(prefix)
        """For reading many lengths at once; single documents are looked up in the file."""
        self._count, self._width = len(self.index.lengths), self.index.dtype.itemsize
        self._files: list[tuple[Path, int]] = []
        self._close = os.close  # a module's names may be gone when an interpreter ends
        for path in (idx_path(prefix), bin_path(prefix)):
            file = os.open(path, os.O_RDONLY)
            self._files.append((path, file))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        self._size = os.fstat(file).st_size

    def __len__(self) -> int:
        return self._count

    @property
    def index_file(self) -> Path:
        """`PREFIX.idx`."""
        return idx_path(self.prefix)

    def tokens_before(self, document: int) -> int:
        """Tokens of all documents before this one; of all, for the number of documents."""
        begin = int(self.index.offsets[document]) if document < self._count else self._size
        return begin // self._width

    def read(self, document: int, start: int, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop`, or to the end, of a document, in the dataset's dtype."""
        begin, end = self._place(document)
        length = (end - begin) // self._width
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise self._damaged(document, f"has {length:,} tokens, and {start:,} to {stop:,} are asked for")
        size = (stop - start) * self._width
        return np.frombuffer(self._read(1, size, begin + start * self._width, document), self.index.dtype)

    def _place(self, document: int) -> tuple[int, int]:
        """First byte and end of a document, checked against one another."""
        (length,) = struct.unpack("<i", self._read(0, 4, HEADER.size + 4 * document, document))
        at = HEADER.size + 4 * self._count + 8 * document
        if document + 1 < self._count:
            begin, end = struct.unpack("<qq", self._read(0, 16, at, document))
        else:
            (begin,), end = struct.unpack("<q", self._read(0, 8, at, document)), self._size
        if length < 0 or begin < 0 or begin % self._width or end - begin != length * self._width:
            raise self._damaged(
                document,
                f"has {length:,} tokens of {self._width} bytes, and lies at bytes {begin:,} to {end:,}",
            )
        return begin, end

    def _damaged(self, document: int, what: str) -> UserError:
        return UserError(
            f"{self.index_file}: document {document:,} {what}; the file is damaged or was replaced: check it "
            f"with `python -m data_tools.verify_dataset {self.prefix}`"
        )

    def _read(self, which: int, size: int, offset: int, document: int) -> bytes:
        path, file = self._files[which]
        try:
            data = os.pread(file, size, offset)
        except OSError as error:
            raise UserError(f"{path}: document {document:,} cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise UserError(
                f"{path}: document {document:,} needs it up to byte {offset + size:,}, and it now ends at "
                f"{os.fstat(file).st_size:,}: it was cut while it is read; restore it, then run the same "
                "command again"
            )
        return data

    def __del__(self) -> None:
        with suppress(AttributeError, OSError, TypeError):
            for _, file in self._files:
                self._close(file)
