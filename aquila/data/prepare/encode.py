"""One worker's task: a block in, a part out."""

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from aquila.data.prepare.answers import Part, answer_mask
from aquila.data.prepare.blocks import Block
from aquila.data.prepare.documents import Document, ReaderOptions, as_reject, read_documents
from aquila.tokenizer import Tokenizer, surrogate_at

_HASH_BYTES = 1 << 22


@dataclass(frozen=True)
class EncodedColumn:
    """Documents of one key: the bytes that a part adds to `.bin`, and the lengths of its documents.

    Or, behind them, the loss mask of the documents.
    """

    tokens: bytes
    """int32, `[CLS] ids </s>` of each document; of a mask uint8, 1 where a token counts."""
    lengths: bytes
    """int32."""
    lowest: int
    highest: int
    crc: int
    counted: int = 0
    """Of a mask: tokens that count."""


@dataclass(frozen=True)
class EncodedBlock:
    """What a block became."""

    outputs: list[EncodedColumn]
    """One for each key; then the mask, where prompts are masked."""
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
    reading: ReaderOptions
    allow_special: bool = False

    def encode(self, block: Block) -> EncodedBlock:
        """The part of one block. Raises `DamagedInputError`; bad documents are collected, not raised."""
        found, lines = read_documents(block, self.reading)
        documents: list[list[str]] = []
        parts: list[list[Part] | None] = []
        rejects: list[dict[str, Any]] = []
        for document in map(self._without_surrogates, found):
            if document.texts is None:
                record = as_reject(block.source.path, document.line, document.reason, document.raw)
                rejects.append(record)
            else:
                documents.append(document.texts)
                parts.append(document.parts)
        columns = [[texts[i] for texts in documents] for i in range(len(self.reading.keys))]
        text_bytes = sum(len(text.encode()) for column in columns for text in column)
        outputs = [self._framed(column) for column in columns]
        if self.reading.mask_prompts:
            outputs.append(self._mask(outputs[0], parts))
        return EncodedBlock(outputs, len(documents), lines, text_bytes, rejects)

    def _without_surrogates(self, document: Document) -> Document:
        """The document, or a bad one where a text holds half of a surrogate pair (JSON's `\\ud800`)."""
        for text in document.texts or ():
            if (place := surrogate_at(text)) is not None:
                code = f"U+{ord(text[place]):04X}"
                reason = f"character {place + 1} is {code}, half of a surrogate pair, which is no text"
                return Document(document.line, None, reason, text)
        return document

    def _framed(self, texts: list[str]) -> EncodedColumn:
        if self.allow_special:
            ids = [self.tokenizer.encode_special_array(text) for text in texts]
            tokens, lengths = self.tokenizer.frame(ids)
        else:
            tokens, lengths = self.tokenizer.encode_documents(texts)
        data = tokens.astype("<i4", copy=False).tobytes()
        lowest, highest = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, -1)
        return EncodedColumn(data, lengths.astype("<i4").tobytes(), lowest, highest, zlib.crc32(data))

    def _mask(self, column: EncodedColumn, parts: list[list[Part] | None]) -> EncodedColumn:
        """The loss mask of the framed documents of `column`, of the same lengths."""
        ends = np.cumsum(np.frombuffer(column.lengths, "<i4"), dtype=np.int64)
        framed = np.split(np.frombuffer(column.tokens, "<i4"), ends[:-1]) if parts else []
        masks = [answer_mask(self._sizes, ids, of) for ids, of in zip(framed, parts, strict=True)]
        mask = np.concatenate(masks) if masks else np.empty(0, np.uint8)
        data = mask.tobytes()
        return EncodedColumn(data, column.lengths, 0, 1, zlib.crc32(data), int(mask.sum(dtype=np.int64)))

    @cached_property
    def _sizes(self) -> np.ndarray:
        """UTF-8 bytes of each id: int64 (vocabulary,)."""
        tokenizer = self.tokenizer
        return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.int64)
