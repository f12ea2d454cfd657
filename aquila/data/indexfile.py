"""The `.bin/.idx` format of Megatron, read and written without Megatron or torch.

`.bin` holds the tokens of all sequences, one after another. `.idx` is little-endian: magic (9 bytes),
version (uint64, 1), dtype code (uint8), number of sequences S (uint64), length D of the document index
(uint64), then sequence lengths (int32, S), byte offsets in `.bin` (int64, S) and the document index
(int64, D): the number of its first sequence for each document, and S at the end.
"""

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from aquila.core.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CODES = {name: code for code, name in DTYPES.items()}
_CHUNK = 1 << 20


class Index(NamedTuple):
    """An `.idx` file, its arrays mapped into memory."""

    dtype: np.dtype
    lengths: np.ndarray
    """int32 (sequences,): tokens of each sequence."""
    offsets: np.ndarray
    """int64 (sequences,): first byte of each sequence in `.bin`."""
    documents: np.ndarray
    """int64 (documents + 1,): first sequence of each document, then the number of sequences."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))


def bin_path(prefix: str | Path) -> Path:
    """`PREFIX.bin`; a dot in the prefix is no extension."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`PREFIX.idx`."""
    return Path(f"{prefix}.idx")


def read_index(prefix: str | Path) -> Index:
    """Maps `PREFIX.idx` and checks its sizes against `PREFIX.bin`; reads nothing but the ends of arrays.

    Raises `UserError` for a missing file, a file that is no index, and sizes that do not agree
    (truncated or overwritten files).
    """
    path = idx_path(prefix)
    for needed in (path, bin_path(prefix)):
        if not needed.is_file():
            stem, dot, kind = str(prefix).rpartition(".")
            if dot and kind in ("bin", "idx") and idx_path(stem).is_file():
                raise UserError(f"dataset {prefix}: a dataset is named without .{kind}: {stem}")
            raise UserError(
                f"dataset {prefix}: {needed} does not exist; make it with data_tools/make_indexed_dataset.sh"
            )
    size = path.stat().st_size
    if size < HEADER.size:
        raise UserError(f"{path}: {size} bytes are too few for an index; the file is cut off, make it again")
    with path.open("rb") as file:
        magic, version, code, sequences, document_entries = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise UserError(f"{path}: not an index of Megatron's format (magic, version or dtype is wrong)")
    expected = HEADER.size + 12 * sequences + 8 * document_entries
    if size not in (expected, expected + sequences):  # the second holds a mode byte per sequence
        raise UserError(
            f"{path}: {size} bytes, but its header announces {sequences} sequences and "
            f"{document_entries} document entries, {expected} bytes; the file is damaged, make it again"
        )
    try:
        raw: np.ndarray = np.memmap(path, mode="r")
    except OSError:  # a file system that maps no files
        raw = np.fromfile(path, np.uint8)
    at = [HEADER.size, HEADER.size + 4 * sequences, HEADER.size + 12 * sequences, expected]
    dtypes = ("<i4", "<i8", "<i8")
    arrays = [raw[a:b].view(kind) for a, b, kind in zip(at[:-1], at[1:], dtypes, strict=True)]
    index = Index(np.dtype(DTYPES[code]), *arrays)
    _check_sizes(prefix, index)
    return index


def _check_sizes(prefix: str | Path, index: Index) -> None:
    size = bin_path(prefix).stat().st_size
    end = 0
    if len(index.lengths):
        end = int(index.offsets[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
    if size != end:
        kind = "cut off" if size < end else "longer than its index"
        raise UserError(
            f"{bin_path(prefix)}: {size} bytes, but {idx_path(prefix)} announces {end}; the file is {kind}, "
            "make the dataset again"
        )
    if len(index.documents) == 0 or index.documents[0] != 0 or index.documents[-1] != len(index.lengths):
        raise UserError(f"{idx_path(prefix)}: its document index is damaged; make the dataset again")


def read_tokens(prefix: str | Path, index: Index) -> np.ndarray:
    """All tokens of `PREFIX.bin`, mapped into memory: (tokens,) of the index's dtype."""
    if bin_path(prefix).stat().st_size == 0:
        return np.empty(0, index.dtype)
    return np.memmap(bin_path(prefix), dtype=index.dtype, mode="r")


def write_index(
    file: BinaryIO, lengths: np.ndarray, documents: np.ndarray | None = None, dtype: str = "<i4"
) -> None:
    """Writes an `.idx` for tokens of `dtype`; without `documents`, each sequence is a document.

    `lengths` int32 (sequences,); `documents` int64 (documents + 1,). Works in chunks, so that memory
    holds little more than the lengths.
    """
    entries = len(lengths) + 1 if documents is None else len(documents)
    code, size = _CODES[dtype], np.dtype(dtype).itemsize
    file.write(HEADER.pack(MAGIC, 1, code, len(lengths), entries))
    for start in range(0, len(lengths), _CHUNK):
        file.write(lengths[start : start + _CHUNK].astype("<i4").tobytes())
    offset = 0
    for start in range(0, len(lengths), _CHUNK):
        ends = offset + size * np.cumsum(lengths[start : start + _CHUNK], dtype=np.int64)
        file.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
        offset = int(ends[-1])
    for start in range(0, entries, _CHUNK):
        stop = min(start + _CHUNK, entries)
        chunk = np.arange(start, stop) if documents is None else documents[start:stop]
        file.write(chunk.astype("<i8").tobytes())
