"""Cuts inputs into blocks of about a megabyte: what one worker encodes in one go."""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aquila.core.errors import UserError
from aquila.data.prepare.inputs import ByteStream, DamagedInputError, Source

BLOCK_BYTES = 1 << 20
_ROWS = 256
"""Of a Parquet file, read at a time."""
_UNFOLDED = 1 << 28
"""Bytes of text up to which that many rows are given at once, else one by one."""


@dataclass(frozen=True)
class RangeBlock:
    """Lines whose first byte lies in [start, end) of an uncompressed file; the worker reads them."""

    source: Source
    start: int
    end: int

    @property
    def weight(self) -> int:
        """Bytes on disk that this block stands for."""
        return self.end - self.start


@dataclass(frozen=True)
class LinesBlock:
    """Whole lines of a compressed file; `numbered` from the lines before them in their file."""

    source: Source
    data: bytes
    weight: int


@dataclass(frozen=True)
class ItemsBlock:
    """Documents with the line (or row) on which each begins: raw JSON text, or parsed rows."""

    source: Source
    items: Sequence[tuple[int, str | dict[str, Any]]]
    weight: int
    broken: tuple[int, str] | None = None
    """(line, reason) where the rest of the file cannot be read."""


@dataclass(frozen=True)
class FileBlock:
    """A whole text file that is one document; the worker reads it."""

    source: Source

    @property
    def weight(self) -> int:
        """Bytes on disk."""
        return self.source.size


Block = RangeBlock | LinesBlock | ItemsBlock | FileBlock


def cut(sources: Sequence[Source], *, text_lines: bool, columns: Sequence[str]) -> Iterator[Block]:
    """All blocks of all sources in order; the same ones each time.

    `text_lines`: each line of a `.txt` file is a document, else each file. `columns`: of Parquet files.
    """
    for source in sources:
        if source.form == "text" and not text_lines:
            yield FileBlock(source)
        elif source.form in ("lines", "text"):
            yield from _ranges(source) if not source.compression else _compressed_lines(source)
        elif source.form == "values":
            yield from _values(source)
        else:
            yield from _rows(source, columns)


def _ranges(source: Source) -> Iterator[RangeBlock]:
    for start in range(0, source.size, BLOCK_BYTES):
        yield RangeBlock(source, start, min(start + BLOCK_BYTES, source.size))


def _compressed_lines(source: Source) -> Iterator[LinesBlock]:
    with ByteStream(source) as stream:
        parts: list[bytes] = []
        size = before = 0
        while chunk := stream.read(BLOCK_BYTES):
            parts.append(chunk)
            size += len(chunk)
            # Look for a line's end only in the new chunk: a very long line must not be searched again.
            if size < BLOCK_BYTES or b"\n" not in chunk:
                continue
            end = chunk.rindex(b"\n") + 1
            parts[-1] = chunk[:end]
            yield LinesBlock(source, b"".join(parts), stream.position() - before)
            parts, size, before = [chunk[end:]], len(chunk) - end, stream.position()
        yield LinesBlock(source, b"".join(parts), stream.position() - before)


def _values(source: Source) -> Iterator[ItemsBlock]:
    """A JSON array's elements, or values one after another, without holding the file in memory."""
    with ByteStream(source) as stream:
        reader = _ValueReader(stream)
        items: list[tuple[int, str]] = []
        size = before = 0
        broken = None
        while True:
            try:
                item = reader.next()
            except _BrokenError as error:
                broken = (error.line, error.reason)
                break
            if item is None:
                break
            items.append(item)
            size += len(item[1])
            if size >= BLOCK_BYTES:
                yield ItemsBlock(source, items, stream.position() - before)
                items, size, before = [], 0, stream.position()
        yield ItemsBlock(source, items, stream.position() - before, broken)


class _BrokenError(Exception):
    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


class _ValueReader:
    """Raw text of one JSON value after another, with the line on which it begins."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._line = 1
        self._ended = False
        self._in_array: bool | None = None

    def next(self) -> tuple[int, str] | None:
        """(line, raw text) of the next value; None at the end. Raises `_BrokenError`."""
        first = self._skip_space()
        if self._in_array is None:
            self._in_array = first == "["
            if self._in_array:
                self._at += 1
                first = self._skip_space()
        elif self._in_array and first == ",":
            self._at += 1
            first = self._skip_space()
            if first == "]":
                raise _BrokenError(self._line, "a comma before the end of the array")
        if self._in_array and first == "]":
            self._at += 1
            if self._skip_space():
                raise _BrokenError(self._line, "something follows the end of the array")
            self._in_array = False
            return None
        if not first:
            if self._in_array:
                raise _BrokenError(self._line, "the file ends within the array")
            return None
        return self._value()

    def _value(self) -> tuple[int, str]:
        while True:
            try:
                _, end = self._scan(self._text, self._at)
                if end < len(self._text) or self._ended:
                    break
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 16
                if self._ended or not unfinished:
                    line = self._line + self._text.count("\n", self._at, error.pos)
                    raise _BrokenError(line, f"not valid JSON: {error.msg}") from None
            except RecursionError:
                raise _BrokenError(self._line, "not valid JSON: brackets are nested too deep") from None
            except ValueError as error:  # a number of thousands of digits
                raise _BrokenError(self._line, f"not valid JSON: {error}") from None
            self._more(max(BLOCK_BYTES, len(self._text) - self._at))
        raw = self._text[self._at : end]
        line = self._line
        self._line += raw.count("\n")
        self._at = end
        return line, raw

    def _skip_space(self) -> str:
        """Moves to the next character that is no white space, and gives it; empty at the end."""
        while True:
            while self._at < len(self._text):
                letter = self._text[self._at]
                if letter not in " \t\r\n":
                    return letter
                self._line += letter == "\n"
                self._at += 1
            if self._ended:
                return ""
            self._more(BLOCK_BYTES)

    def _more(self, size: int) -> None:
        parts = [self._text[self._at :]]
        self._at = 0
        read = 0
        while read < size and not self._ended:
            chunk = self._stream.read(size)
            read += len(chunk)
            self._ended = not chunk
            try:
                parts.append(self._decode(chunk, not chunk))
            except UnicodeDecodeError as error:
                before = "".join(parts) + chunk[: error.start].decode("utf-8", "ignore")
                raise _BrokenError(self._line + before.count("\n"), "not UTF-8 text") from None
        self._text = "".join(parts)


def _unfolded(batch: Any) -> int:
    """Bytes of all texts of a batch, those counted again that its dictionaries hold once."""
    from pyarrow import compute

    columns = [column for column in batch.columns if hasattr(column, "dictionary")]
    sizes = [compute.sum(compute.binary_length(c.dictionary).take(c.indices)).as_py() for c in columns]
    return sum(size or 0 for size in sizes)


def _batch_rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a record batch. A cell that is no text, though its column says so, is given as bytes."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = {name: [_cell(value) for value in batch.column(name)] for name in batch.schema.names}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        as_buffer = getattr(getattr(value, "value", value), "as_buffer", None)
        return as_buffer().to_pybytes() if as_buffer else b""


def _rows(source: Source, columns: Sequence[str]) -> Iterator[ItemsBlock]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"input {source.path}: Parquet needs a package: run `pip install pyarrow`") from None
    try:
        schema = parquet.read_schema(source.path)
        present = [name for name in (*columns, "conversations") if name in schema.names]
        # As a dictionary, a text that a few bytes repeat in every row is in memory once.
        kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
        texts = [name for name in present if schema.field(name).type in kinds]
        with parquet.ParquetFile(source.path, read_dictionary=texts, buffer_size=BLOCK_BYTES) as file:
            row, rows = 1, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_ROWS, columns=present):
                few = 1 if _unfolded(batch) > _UNFOLDED else _ROWS
                for first in range(0, len(batch), few):
                    items = list(enumerate(_batch_rows(batch.slice(first, few)), start=row))
                    row += len(items)
                    yield ItemsBlock(source, items, source.size * len(items) // rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedInputError(f"input {source.path}: not a readable Parquet file: {error}") from None
