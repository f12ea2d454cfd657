"""Input files: which ones are meant, what they hold, how they are opened."""

import glob
import gzip
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Protocol

from aquila.core.errors import UserError

FORMS = {".jsonl": "lines", ".ndjson": "lines", ".json": "values", ".txt": "text", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")


class DamagedInputError(UserError):
    """An input that cannot be read to its end: cut off, or not of the format that its name says."""


@dataclass(frozen=True)
class Source:
    """An input file."""

    path: str
    form: str
    """`lines` (JSONL), `values` (a JSON array, or JSON values one after another), `text`, `parquet`."""
    compression: str
    """`.gz`, `.zst` or empty."""
    size: int
    """Bytes on disk."""
    modified: int
    """Time of the last change, ns: an interrupted run goes on only with unchanged inputs."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files meant by paths, folders and globs: in the order given, and sorted by name within each.

    Raises `UserError` for what does not exist, a folder or glob without matching files, an extension
    that says nothing, and a file named twice.
    """
    paths = [path for item in inputs for path in _expand(item)]
    seen: set[str] = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise UserError(f"input {path} is named twice; its documents would stand in the dataset twice")
        seen.add(real)
    return [_source(path) for path in paths]


def _expand(item: str) -> list[str]:
    known = ", ".join(FORMS) + ", each also .gz or .zst"
    if os.path.isdir(item):
        walked = _walk(item)
        hidden = {path for path in walked if "/." in f"/{os.path.relpath(path, item)}"}
        found = sorted(path for path in walked if _kind(path) and path not in hidden)
        _tell_left_out(item, "of no known kind", [path for path in walked if not _kind(path)])
        _tell_left_out(item, "hidden by a dot", [path for path in hidden if _kind(path)])
        if not found:
            raise UserError(f"input folder {item} holds no file of a known kind ({known})")
        return found
    if os.path.exists(item):
        if not _kind(item):
            raise UserError(f"input {item}: unknown kind of file; known are {known}")
        return [item]
    if glob.has_magic(item):
        matched = [path for path in glob.glob(item, recursive=True) if not os.path.isdir(path)]
        found = sorted(path for path in matched if _kind(path))
        _tell_left_out(item, "of no known kind", [path for path in matched if not _kind(path)])
        if not found:
            raise UserError(f"input {item} matches no file of a known kind ({known})")
        return found
    raise UserError(f"input {item} does not exist")


def _walk(folder: str) -> list[str]:
    """The files below a folder, through linked folders as well, each folder once."""
    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.join(here, name) for name in names]
    return found


def _tell_left_out(item: str, why: str, paths: list[str]) -> None:
    """Whatever is not read is counted and named."""
    if paths:
        names = ", ".join(sorted(os.path.basename(path) for path in paths)[:5])
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        print(
            f"warning: input {item}: {len(paths)} file(s) {why} are left out: {names}{more}",
            file=sys.stderr,
        )


def _kind(path: str) -> tuple[str, str] | None:
    stem, extension = os.path.splitext(path.lower())
    compression = extension if extension in COMPRESSIONS else ""
    if compression:
        extension = os.path.splitext(stem)[1]
    form = FORMS.get(extension)
    return (form, compression) if form and not (form == "parquet" and compression) else None


def _source(path: str) -> Source:
    kind = _kind(path)
    assert kind is not None
    form, compression = kind
    try:
        state = os.stat(path)
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"input {path} cannot be read: {error.strerror}") from None
    return Source(path, form, compression, state.st_size, state.st_mtime_ns)


_MOST_FOLD, _FREE_BYTES = 500, 256 << 20
"""Text shrinks to a hundredth at best; what shrinks further, beyond so many bytes, is made to fill memory."""


class ByteStream:
    """The bytes of a source, decompressed, with the position in the file on disk."""

    def __init__(self, source: Source) -> None:
        self._source, self._unfolded = source, 0
        self._file = open(source.path, "rb")  # noqa: SIM115
        self._stream = _OPENERS[source.compression](self._file, source)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; empty at the end. Raises `DamagedInputError`."""
        try:
            data = self._stream.read(size)
        except (OSError, EOFError, zlib.error, _zstd_error()) as error:
            raise DamagedInputError(f"input {self._source.path}: cannot be decompressed: {error}") from None
        self._unfolded += len(data)
        if self._unfolded > max(_FREE_BYTES, _MOST_FOLD * self.position()):
            raise DamagedInputError(
                f"input {self._source.path}: unfolds to more than {_MOST_FOLD} times its size, which no text "
                "does; if it is meant, unpack it and give the file itself"
            )
        return data

    def position(self) -> int:
        """Bytes of the file on disk read so far."""
        return self._file.tell()

    def __enter__(self) -> "ByteStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _open_zstd(file: BinaryIO, source: Source) -> "_Readable":
    try:
        import zstandard
    except ImportError:
        raise UserError(f"input {source.path}: .zst needs a package: run `pip install zstandard`") from None
    return _WholeZstd(zstandard.ZstdDecompressor(), file)


class _Readable(Protocol):
    def read(self, size: int) -> bytes: ...


class _WholeZstd:
    """A zstd stream of one or more frames whose cut-off end is an error, not an early end."""

    def __init__(self, decompressor: Any, file: BinaryIO) -> None:
        self._decompressor, self._file = decompressor, file
        self._frame = decompressor.decompressobj()
        self._rest = b""
        self._fresh = True

    def read(self, size: int) -> bytes:
        while True:
            chunk = self._rest or self._file.read(1 << 17)
            self._rest = b""
            if not chunk:
                if not self._fresh:
                    raise EOFError("the file ends within a compressed frame")
                return b""
            self._fresh = False
            data = self._frame.decompress(chunk)
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._fresh = True
            if data:
                return data


def _zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ImportError:
        return EOFError
    return zstandard.ZstdError


_OPENERS: dict[str, Callable[[BinaryIO, Source], _Readable]] = {
    "": lambda file, source: file,
    ".gz": lambda file, source: gzip.GzipFile(fileobj=file),
    ".zst": _open_zstd,
}
