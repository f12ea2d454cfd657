"""What every tokenizer can do, and decoding."""

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from aquila.core.errors import UserError

SPECIAL_TOKENS = (
    "<|startofpiece|>",
    "<|endofpiece|>",
    "<|LDWANG|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "[CLS]",
    "</s>",
)
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """What every tokenizer can do. Ids are Python ints, arrays are int32."""

    special_tokens: dict[str, int]
    """Text to id of the special tokens, in id order; corpus text never becomes one of them."""
    vocab_size: int
    """All ids are below this."""
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str
    """SHA-256 of what decides the ids, whatever the files' formatting."""

    engine: str = ""
    """The library that computes the ids, its version, and why it is not a faster one."""
    is_fast = True
    """Whether the fastest known way to the ids is taken."""

    _strip_first_space = False
    """Whether decoding leaves out a space before the first token."""

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text` as int32, without specials. Raises `UserError` for a lone surrogate."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`, without `[CLS]` and `</s>` around it.

        A special token written out in the text stays ordinary text, unless `allow_special`.
        Raises `UserError` for a lone surrogate, which is no text.
        """
        if allow_special:
            return self.encode_special_array(text).tolist()
        return self.encode_array(text).tolist()

    def encode_special_array(self, text: str) -> np.ndarray:
        """As `encode_array`, with special tokens written out in the text turned into their ids."""
        names = sorted(self.special_tokens, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        ids = [
            np.array([self.special_tokens[part]], np.int32) if i % 2 else self.encode_array(part)
            for i, part in enumerate(parts)
        ]
        return np.concatenate(ids)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Documents framed as `[CLS] ids </s>`, one after another: ids and lengths, both int32.

        Raises `UserError` for a lone surrogate in any of them.
        """
        return self.frame([self.encode_array(text) for text in texts])

    def frame(self, documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The same from documents that are encoded already."""
        lengths = np.fromiter((len(ids) + 2 for ids in documents), np.int32, len(documents))
        ends = np.cumsum(lengths, dtype=np.int64)
        tokens = np.empty(int(ends[-1]) if len(ends) else 0, np.int32)
        tokens[ends - lengths], tokens[ends - 1] = self.bos_id, self.eos_id
        for ids, end in zip(documents, ends.tolist(), strict=True):
            tokens[end - 1 - len(ids) : end - 1] = ids
        return tokens, lengths

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one id, specials by their name. Raises `UserError` outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise UserError(f"token id {token} is outside the vocabulary of {self.vocab_size} ids")
        return self._bytes[token]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises `UserError` for an id outside the vocabulary.
        """
        stream = self.decode_stream(skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def decode_stream(self, skip_special: bool = True) -> "DecodeStream":
        """A decoder fed one id at a time, that gives out whole characters only."""
        return DecodeStream(self, skip_special)

    @property
    @abstractmethod
    def _bytes(self) -> list[bytes]:
        """UTF-8 bytes of each id."""

    def _place_specials(self, vocab: dict[str, int], vocab_size: int) -> None:
        """Sets the special ids: their own in the vocabulary where it has them, else after the last id."""
        following = iter(range(vocab_size, vocab_size + len(SPECIAL_TOKENS)))
        specials = {name: vocab[name] if name in vocab else next(following) for name in SPECIAL_TOKENS}
        self.vocab_size = max([vocab_size - 1, *specials.values()]) + 1
        self.bos_id, self.eos_id = specials["[CLS]"], specials["</s>"]
        if END_OF_TEXT in vocab:
            specials = {END_OF_TEXT: vocab[END_OF_TEXT]} | specials
        self.special_tokens = specials
        self.pad_id = specials.get(END_OF_TEXT, 0)


class DecodeStream:
    """Incremental decoding. `push` gives the text that became whole, `flush` what is left."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = set(tokenizer.special_tokens.values()) if skip_special else set()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer._strip_first_space

    def push(self, token: int) -> str:
        """Text completed by `token`; empty while a character is not whole yet."""
        data = self._tokenizer.token_bytes(token)
        if token in self._skipped:
            return ""
        if self._at_start:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The end: bytes of an unfinished character become U+FFFD."""
        return self._decoder.decode(b"", True)


def surrogate_at(text: str) -> int | None:
    """Place of the first half of a surrogate pair, which is no text; None where there is none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def refusing_surrogates(encode: Callable[[str], np.ndarray], text: str) -> np.ndarray:
    """`encode(text)`, with a `UserError` for the lone surrogate that made it fail."""
    try:
        return encode(text)
    except (UnicodeEncodeError, TypeError, RuntimeError):  # of gigatoken, tokenizers, sentencepiece
        place = surrogate_at(text) if isinstance(text, str) else None
        if place is None:
            raise
        raise UserError(
            f"character {place + 1} is U+{ord(text[place]):04X}, half of a surrogate pair, which is no text"
        ) from None


def fingerprint(*content: object) -> str:
    """SHA-256 of what decides the ids."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
