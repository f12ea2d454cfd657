"""From a block to its documents: the text of each, or what is wrong with it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from aquila.core.text_files import parse_json
from aquila.data.prepare.answers import Part, conversation_parts
from aquila.data.prepare.bad import BadDocumentError
from aquila.data.prepare.blocks import Block, FileBlock, ItemsBlock, LinesBlock, RangeBlock
from aquila.data.prepare.inputs import ByteStream

_RAW_KEPT = 1 << 20


class Document(NamedTuple):
    """A document of a block."""

    line: int
    """Line (row in Parquet) on which it begins: in its file, or in its block (`relative`)."""
    texts: list[str] | None
    """A text for each key; None for a bad one."""
    reason: str = ""
    raw: Any = ""
    parts: list[Part] | None = None
    """Of a conversation whose answers alone are to count."""


@dataclass(frozen=True)
class ReaderOptions:
    """How documents are read."""

    keys: tuple[str, ...] = ("text",)
    template: str = "plain"
    mask_prompts: bool = False
    """Of conversations the answers alone count."""


def read_documents(block: Block, reading: ReaderOptions) -> tuple[Iterator[Document], int]:
    """The documents of a block, and how many lines it holds where their numbers are relative, else 0."""
    if isinstance(block, FileBlock):
        return _whole_file(block), 0
    if isinstance(block, ItemsBlock):
        return _items(block, reading), 0
    data = _read_range(block) if isinstance(block, RangeBlock) else block.data
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return _lines(block, lines, reading), len(lines)


def _read_range(block: RangeBlock) -> bytes:
    """The lines that begin in the range; the last may reach beyond it."""
    with open(block.source.path, "rb") as file:
        from_ = max(block.start - 1, 0)
        file.seek(from_)
        data = file.read(block.end - from_)
        if block.start > 0:
            line_end = data.find(b"\n")
            if line_end < 0:
                return b""
            data = data[line_end + 1 :]
        if data and not data.endswith(b"\n"):
            data += file.readline()
        return data


def _lines(block: LinesBlock | RangeBlock, lines: list[bytes], reading: ReaderOptions) -> Iterator[Document]:
    as_text = block.source.form == "text"
    for number, line in enumerate(lines, start=1):
        if not line or line.isspace():
            continue
        try:
            text = _decode(line)
            whole = text.rstrip("\r")
            yield (
                Document(number, [_checked(whole)]) if as_text else document_of(number, _parse(text), reading)
            )
        except BadDocumentError as bad:
            yield Document(number, None, str(bad), line)


def _items(block: ItemsBlock, reading: ReaderOptions) -> Iterator[Document]:
    for line, item in block.items:
        try:
            value = _parse(item) if isinstance(item, str) else item
            yield document_of(line, value, reading)
        except BadDocumentError as bad:
            yield Document(line, None, str(bad), item)
    if block.broken:
        line, reason = block.broken
        yield Document(line, None, f"{reason}; the rest of the file cannot be read", "")


def _whole_file(block: FileBlock) -> Iterator[Document]:
    with ByteStream(block.source) as stream:
        parts = []
        while chunk := stream.read(1 << 24):
            parts.append(chunk)
    data = b"".join(parts)
    try:
        yield Document(1, [_checked(_decode(data))])
    except BadDocumentError as bad:
        yield Document(1, None, str(bad), data)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig") if data.startswith(b"\xef\xbb\xbf") else data.decode()
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"invalid UTF-8 at byte {error.start + 1}") from None


def _parse(text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise BadDocumentError(f"not valid JSON: {error.msg} (character {error.pos + 1})") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadDocumentError(f"not valid JSON: {error}") from None


def document_of(line: int, value: Any, reading: ReaderOptions) -> Document:
    """The text under each key of a JSON object; a conversation's turns where it has no such key.

    Raises `BadDocumentError`.
    """
    if not isinstance(value, dict):
        raise BadDocumentError(f"a JSON object is wanted, not {_kind(value)}")
    if reading.keys == ("text",) and "text" not in value and "conversations" in value:
        parts = conversation_parts(value["conversations"], reading.template, answers=reading.mask_prompts)
        texts = [_checked("".join(text for text, _ in parts))]
        return Document(line, texts, parts=parts if reading.mask_prompts else None)
    return Document(line, [_checked(_under(value, key)) for key in reading.keys])


def _under(value: dict[str, Any], key: str) -> str:
    if key not in value:
        has = ", ".join(map(repr, list(value)[:8])) or "no key"
        raise BadDocumentError(f"key '{key}' is missing (the object has {has})")
    if not isinstance(value[key], str):
        raise BadDocumentError(f"'{key}' holds {_kind(value[key])}, not text")
    return value[key]


def _checked(text: str) -> str:
    if not text:
        raise BadDocumentError("the document is empty")
    if "\x00" in text:
        raise BadDocumentError(f"NUL byte (character {text.index(chr(0)) + 1}): binary data?")
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    names[bytes] = "binary data"
    return names.get(type(value), "a number")


def as_reject(path: str, line: int, reason: str, raw: Any) -> dict[str, Any]:
    """A line of the rejects file. Bytes that are no UTF-8 appear as `\\udcXX`; at most 1 MiB is kept."""
    if isinstance(raw, bytes):
        text = raw[:_RAW_KEPT].decode("utf-8", "surrogateescape")
    else:
        text = (raw if isinstance(raw, str) else json.dumps(raw, default=str))[:_RAW_KEPT]
    record = {"file": path, "line": line, "reason": reason, "raw": text}
    return record | ({"cut_off": True} if len(raw) > len(text) > 0 and len(text) == _RAW_KEPT else {})
