"""Byte-level BPE with GPT-2's splitting pattern, as Aquila uses it.

`tokenizers` defines the ids; `aquila.tokenizer.fast` computes the same ones many times as fast.
"""

import re
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from aquila.core.errors import UserError
from aquila.core.text_files import read_json, read_text
from aquila.tokenizer.base import Tokenizer, fingerprint, refusing_surrogates, surrogate_at
from aquila.tokenizer.fast import PROBE, VERSIONS, FastEncoder

_LONG = 1 << 20
"""Texts above this many characters are encoded in pieces, so that memory follows the ids, not the text."""

MOST_IDS = 1 << 24
"""Ids below this: a table by id is held in memory, and the embedding has a row for each."""

# A letter or digit, then a space or punctuation: the pattern always ends a piece between the two, and
# looks at nothing to the left, so text may be cut there without any change of its ids. The second set is
# spelled out because what counts as a letter differs between Unicode versions.
_CUT = re.compile(r"[^\W_](?=[ \t\n.,;:!?()，。、；：！？])")

_SELF = re.compile(r"[<\[].*[>\]]$|.*[^\x21-\x7e\u00a1-\u0143].*", re.DOTALL)
"""Tokens that no merge makes: marks in brackets, and text that is not in GPT-2's letters for bytes."""


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE with GPT-2's pattern: `vocab.json`, `merges.txt`, `special_tokens_map.json`."""

    def __init__(self, folder: Path, *, fast: bool = True) -> None:
        self._folder = folder
        vocab, merges = self.read_files()
        self._place_specials(vocab, max(vocab.values()) + 1)
        self._name_ends(folder / "special_tokens_map.json")
        self.fingerprint = fingerprint("byte-level-bpe", vocab, merges, self.special_tokens)
        self._fast, self.engine = None, "tokenizers, as asked"
        if fast:
            self._fast, self.engine = self._fast_encoder(vocab, merges)
        self.is_fast = self._fast is not None

    def read_files(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Token to id of `vocab.json`, and the pairs of `merges.txt` in their order."""
        # Read again where needed, not kept: a hundred thousand Python strings in every worker add up.
        vocab = _read_vocab(self._folder / "vocab.json")
        return vocab, _read_merges(self._folder / "merges.txt", vocab)

    def _fast_encoder(
        self, vocab: dict[str, int], merges: list[tuple[str, str]]
    ) -> tuple[FastEncoder | None, str]:
        """The fast encoder, if it can be trusted here, and the name of what encodes."""
        definition = _definition(vocab, merges)
        reason = _why_not_fast(vocab, merges)
        if reason is None:
            try:
                fast = FastEncoder(vocab, merges)
                if fast.encode(PROBE).tolist() == definition.encode(PROBE).ids:
                    return fast, f"gigatoken {version('gigatoken')}"
                reason = f"gigatoken {version('gigatoken')} gives other ids for the text it is checked with"
            except ImportError as error:
                reason = f"no gigatoken ({error}); run `pip install '{VERSIONS}'`"
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # what a panic in Rust becomes is no Exception
                reason = f"gigatoken failed: {error!r}"
        self.definition = definition
        return None, f"tokenizers, 20 times slower: {reason}"

    def encode_array(self, text: str) -> np.ndarray:
        return refusing_surrogates(self._encode, text)

    def _encode(self, text: str) -> np.ndarray:
        if self._fast is not None:
            ids = [self._fast.encode(part) for part in _pieces(text)]
        else:
            ids = [np.array(self.definition.encode(part).ids, np.int32) for part in _pieces(text)]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    @cached_property
    def definition(self):
        """The `tokenizers.Tokenizer` whose ids are right by definition."""
        return _definition(*self.read_files())

    def _name_ends(self, path: Path) -> None:
        """Lets `special_tokens_map.json`, where there is one, name the tokens around a document."""
        if not path.is_file():
            return
        named = read_json(path)
        for key, attribute in (("cls_token", "bos_id"), ("sep_token", "eos_id")):
            entry = named.get(key)
            content = entry.get("content") if isinstance(entry, dict) else entry
            if content is None:
                continue
            if not isinstance(content, str) or content not in self.special_tokens:
                known = ", ".join(self.special_tokens)
                raise UserError(f"{path}: {key} {content!r} is no special token; known are {known}")
            setattr(self, attribute, self.special_tokens[content])

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, index in _read_vocab(self._folder / "vocab.json").items():
            table[index] = token_to_bytes(token)
        for name, index in self.special_tokens.items():
            table[index] = name.encode()
        return table


def _pieces(text: str) -> list[str]:
    """`text` in parts of about `_LONG` characters that can be encoded one by one with the same ids."""
    if len(text) <= _LONG:
        return [text]
    parts, start = [], 0
    while len(text) - start > _LONG and (cut := _CUT.search(text, start + _LONG)):
        parts.append(text[start : cut.end()])
        start = cut.end()
    return [*parts, text[start:]]


def _definition(vocab: dict[str, int], merges: list[tuple[str, str]]):
    from tokenizers import Tokenizer as Definition
    from tokenizers import models, pre_tokenizers

    definition = Definition(models.BPE(vocab, merges))
    definition.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return definition


def _why_not_fast(vocab: dict[str, int], merges: list[tuple[str, str]]) -> str | None:
    """What in a vocabulary could make gigatoken's ids differ from those of `tokenizers`; None: nothing.

    gigatoken takes the number of a joined token for the rank of its pair, and finds tokens by their bytes.
    """
    if not _byte_letters().keys() <= vocab.keys():
        return "the vocabulary lacks single bytes"
    if len({left + right for left, right in merges}) != len(merges):
        return "two merges make the same token"
    if len({token_to_bytes(token) for token in vocab}) != len(vocab):
        return "two tokens are the same bytes"
    return None


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in `vocab.json` (GPT-2's table), in byte order.

    Printable Latin-1 characters stand for themselves, the others for U+0100 and onwards in byte order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: 0x100 + i for i, byte in enumerate(others)}
    return {chr(shifted.get(byte, byte)): byte for byte in range(256)}


_LETTERS = _byte_letters()


def token_to_bytes(token: str) -> bytes:
    """The bytes that a token of `vocab.json` stands for."""
    try:
        return bytes([_LETTERS[letter] for letter in token])
    except KeyError:  # a token added as plain text
        return token.encode()


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path)
    if not vocab or not all(type(index) is int and 0 <= index < MOST_IDS for index in vocab.values()):
        raise UserError(f"{path}: must map each token to its id, a whole number from 0 to {MOST_IDS - 1}")
    if surrogate_at("".join(vocab)) is not None:
        token = next(token for token in vocab if surrogate_at(token) is not None)
        raise UserError(f"{path}: token {token!a} is half of a surrogate pair, which is no text")
    if len(set(vocab.values())) != len(vocab):
        raise UserError(f"{path}: two tokens share an id")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: byte-level BPE needs it beside vocab.json")
    text, merges = read_text(path), []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise UserError(f"{path}, line {number}: {line!r} is no pair of tokens of vocab.json")
        merges.append(pair)
    _check_all_made(path, vocab, merges, ended=text.endswith("\n"))
    return merges


def _check_all_made(path: Path, vocab: dict[str, int], merges: list[tuple[str, str]], *, ended: bool) -> None:
    """Refuses merges that were cut: a text would become other, shorter tokens, and nobody would notice.

    Tokens that stand for themselves, such as `<sep>`, and a few strays are made by no merge in whole files.
    """
    made = {left + right for left, right in merges}
    stray = [t for t in vocab if len(t) > 1 and t not in made and not _SELF.match(t)]
    if len(stray) > (max(8, len(vocab) // 1000) if ended else 0):
        raise UserError(
            f"{path}: {len(stray)} of {len(vocab)} tokens of vocab.json, such as {stray[-1]!r}, are made by "
            "no line: the file is cut, or belongs to another vocab.json; copy both again"
        )
