"""One worker's task: a block in, a part out."""

import hashlib
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from aquila.data.prepare.blocks import Block
from aquila.data.prepare.documents import Found, Reading, as_reject, read_documents
from aquila.errors import UserError
from aquila.tokenizer import Tokenizer

_HASH_BYTES = 1 << 22


@dataclass(frozen=True)
class Encoded:
    """Documents of one key: the bytes that a part adds to `.bin`, and the lengths of its documents."""

    tokens: bytes
    """int32, `[CLS] ids </s>` of each document."""
    lengths: bytes
    """int32."""
    lowest: int
    highest: int
    crc: int


@dataclass(frozen=True)
class Part:
    """What a block became."""

    outputs: list[Encoded]
    """One for each key."""
    documents: int
    lines: int
    """Lines of the block, where line numbers are relative to it."""
    text_bytes: int
    rejects: list[dict[str, Any]]
    """Bad documents, as lines of the rejects file."""


@dataclass(frozen=True)
class Encoder:
    """Frames and encodes documents; the same for every block of a run."""

    tokenizer: Tokenizer
    reading: Reading
    allow_special: bool = False

    def encode(self, block: Block) -> Part:
        """The part of one block. Raises `DamagedInputError`; bad documents are collected, not raised."""
        found, lines = read_documents(block, self.reading)
        keys = len(self.reading.keys)
        ids: list[list[np.ndarray]] = [[] for _ in range(keys)]
        rejects: list[dict[str, Any]] = []
        text_bytes = 0
        for document in found:
            if document.texts is not None:
                encoded, reason = self._ids(document)
                if encoded is not None:
                    for key in range(keys):
                        ids[key].append(encoded[key])
                    text_bytes += sum(map(len, document.texts))
                    continue
                document = document._replace(reason=reason, raw=document.texts[0])
            rejects.append(as_reject(block.source.path, document.line, document.reason, document.raw))
        outputs = [self._framed(documents) for documents in ids]
        return Part(outputs, len(ids[0]), lines, text_bytes, rejects)

    def _ids(self, document: Found) -> tuple[list[np.ndarray] | None, str]:
        encode = self.tokenizer.encode_special_array if self.allow_special else self.tokenizer.encode_array
        try:
            return [encode(text) for text in document.texts], ""
        except UserError as error:  # half of a surrogate pair
            return None, str(error)

    def _framed(self, documents: list[np.ndarray]) -> Encoded:
        lengths = np.fromiter((len(ids) + 2 for ids in documents), np.int32, len(documents))
        tokens = np.empty(int(lengths.sum(dtype=np.int64)), np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        tokens[ends - lengths] = self.tokenizer.bos_id
        tokens[ends - 1] = self.tokenizer.eos_id
        for ids, end, length in zip(documents, ends.tolist(), lengths.tolist(), strict=True):
            tokens[end - length + 1 : end - 1] = ids
        data = tokens.astype("<i4", copy=False).tobytes()
        lowest, highest = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, -1)
        return Encoded(data, lengths.astype("<i4").tobytes(), lowest, highest, zlib.crc32(data))


def checksum(path: str) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
