"""Tokenizers of other models by their `tokenizer.json`: byte-level BPE, or SentencePiece's kinds.

The `tokenizers` library computes the ids. The marks around a document are those that
`tokenizer_config.json` or `special_tokens_map.json` names.
"""

import re
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from aquila.core.errors import UserError
from aquila.core.text_files import read_json
from aquila.tokenizer.base import Tokenizer, fingerprint, refusing_surrogates
from aquila.tokenizer.bytepair import MOST_IDS, token_to_bytes

FILE, MARKS = "tokenizer.json", ("tokenizer_config.json", "special_tokens_map.json")
_NOT_IDS = ("version", "truncation", "padding", "post_processor", "decoder")
"""Parts of `tokenizer.json` that do not decide the ids of a text."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class JsonTokenizer(Tokenizer):
    """`tokenizer.json` with its own special tokens."""

    is_fast = False

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Definition

        path = folder / FILE
        content = read_json(path)
        try:
            self._definition = Definition.from_file(str(path))
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"{path}: not a tokenizer: {error}") from None
        # Special tokens that are written out in a text stay text.
        self._definition.encode_special_tokens = True
        self._definition.no_truncation()
        self._definition.no_padding()
        self._byte_level = _kind(content, path)
        vocab = self._definition.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > MOST_IDS:
            raise UserError(f"{path}: ids up to {self.vocab_size - 1}; that is no vocabulary")
        added = self._definition.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(added.items()) if token.special}
        self._plain = {i: token.content for i, token in added.items() if not token.special}
        self.bos_id, self.eos_id, self.pad_id = self._marks(folder)
        ids = {key: value for key, value in content.items() if key not in _NOT_IDS}
        self.fingerprint = fingerprint("tokenizer.json", ids, self.bos_id, self.eos_id)
        self.engine = f"tokenizers {version('tokenizers')}, as {FILE} says"
        # A space that is put before every text is taken away again in decoding.
        first = self._definition.encode("a", add_special_tokens=False).ids
        self._strip_first_space = b"".join(map(self.token_bytes, first)).startswith(b" ")

    def _marks(self, folder: Path) -> tuple[int, int, int]:
        """bos, eos and pad; pad is eos where none is named."""
        named: dict[str, str] = {}
        for name in reversed(MARKS):
            if (folder / name).is_file():
                named |= {k: v for k, v in read_json(folder / name).items() if k.endswith("_token") and v}
        found = []
        for key in ("bos_token", "eos_token", "pad_token"):
            entry: Any = named.get(key)
            content = entry.get("content") if isinstance(entry, dict) else entry
            if content is None and key == "pad_token":
                content = next(name for name, index in self._all.items() if index == found[1])
            if not isinstance(content, str) or content not in self._all:
                what = f"{content!r} of the vocabulary" if content else "there"
                raise UserError(
                    f"{folder}: {key} must be named in {' or '.join(MARKS)}, beside {FILE}: documents stand "
                    f"between bos and eos; it is not {what}"
                )
            self.special_tokens.setdefault(content, self._all[content])
            found.append(self._all[content])
        return found[0], found[1], found[2]

    @property
    def _all(self) -> dict[str, int]:
        return self._definition.get_vocab(with_added_tokens=True)

    def encode_array(self, text: str) -> np.ndarray:
        def ids(whole: str) -> np.ndarray:
            return np.array(self._definition.encode(whole, add_special_tokens=False).ids, np.int32)

        return refusing_surrogates(ids, text)

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, index in self._definition.get_vocab(with_added_tokens=False).items():
            table[index] = self._to_bytes(token)
        for name, index in self.special_tokens.items():
            table[index] = name.encode()
        for index, name in self._plain.items():
            table[index] = name.encode()
        return table

    def _to_bytes(self, token: str) -> bytes:
        if self._byte_level:
            return token_to_bytes(token)
        if match := _BYTE.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


def _kind(content: dict[str, Any], path: Path) -> bool:
    """Whether tokens are in GPT-2's letters for bytes, not in SentencePiece's text. Refuses other kinds."""
    decoders = _parts(content.get("decoder"), "decoders")
    kinds = {part.get("type") for part in decoders}
    model = (content.get("model") or {}).get("type", "BPE")
    if model in ("BPE", "Unigram"):
        if "ByteLevel" in kinds:
            return True
        spaces = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        if "Metaspace" in kinds or spaces in decoders:
            return False
    raise UserError(f"{path}: decodes by {model} and {sorted(map(str, kinds))}, which is not known here")


def _parts(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if not part:
        return []
    return part.get(key) or [] if part.get("type") == "Sequence" else [part]
