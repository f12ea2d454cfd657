"""Byte-level BPE with GPT-2's splitting pattern, as Aquila uses it.

`tokenizers` defines the ids. Where the vocabulary allows it (`_fast_path` says when), `tiktoken` computes
the same ids several times as fast.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from aquila.core.errors import UserError
from aquila.core.text_files import read_json, read_text
from aquila.tokenizer.base import Tokenizer, fingerprint, refusing_surrogates

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's splitting pattern (Radford et al. 2019), whose pieces BPE never joins."""

_LONG = 1 << 20
"""Texts above this many characters are encoded in pieces, so that memory follows the ids, not the text."""

# A letter or digit, then a space or punctuation: the pattern always ends a piece between the two, and
# looks at nothing to the left, so text may be cut there without any change of its ids. The second set is
# spelled out because what counts as a letter differs between Unicode versions.
_CUT = re.compile(r"[^\W_](?=[ \t\n.,;:!?()，。、；：！？])")

_SELF = re.compile(r"[<\[].*[>\]]$|.*[^\x21-\x7e\u00a1-\u0143].*", re.DOTALL)
"""Tokens that no merge makes: marks in brackets, and text that is not in GPT-2's letters for bytes."""

_BEGIN, _END = "\0<", "\0>"
"""What `tiktoken` takes for `[CLS]` and `</s>`, where many documents are encoded in one call."""
_FRAME = _END + _BEGIN
_FRAME_TOKENS = frozenset({_BEGIN, _END})


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE with GPT-2's pattern: `vocab.json`, `merges.txt`, `special_tokens_map.json`."""

    def __init__(self, folder: Path, *, fast: bool = True) -> None:
        self._folder = folder
        vocab, merges = self._read()
        self._place_specials(vocab, max(vocab.values()) + 1)
        self._name_ends(folder / "special_tokens_map.json")
        self.fingerprint = fingerprint("byte-level-bpe", vocab, merges, self.special_tokens)
        self._fast = _fast_path(vocab, merges, (self.bos_id, self.eos_id)) if fast else None
        if self._fast is None:
            _ = self.definition  # now, before worker processes are forked

    def _read(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        # Read again where needed, not kept: a hundred thousand Python strings in every worker add up.
        vocab = _read_vocab(self._folder / "vocab.json")
        return vocab, _read_merges(self._folder / "merges.txt", vocab)

    @property
    def is_fast(self) -> bool:
        """Whether `tiktoken` computes the ids."""
        return self._fast is not None

    def encode_array(self, text: str) -> np.ndarray:
        return refusing_surrogates(self._encode, text)

    def _encode(self, text: str) -> np.ndarray:
        if self._fast is None:
            ids = [np.array(self.definition.encode(part).ids, np.int32) for part in _pieces(text)]
        else:
            encoding, id_of_rank = self._fast
            ids = [id_of_rank[_ranks(encoding, part)] for part in _pieces(text)]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        joined = _FRAME.join(texts)
        # One call for all is quicker than one for each. NUL marks the borders, so no text may hold it.
        unmarked = joined.count("\0") == 2 * (len(texts) - 1)
        if self._fast is None or not texts or not unmarked or len(joined) > 4 * _LONG:
            return super().encode_documents(texts)
        tokens = refusing_surrogates(self._encode_framed, f"{_BEGIN}{joined}{_END}")
        ends = np.flatnonzero(tokens == self.eos_id) + 1
        return tokens, np.diff(ends, prepend=0).astype(np.int32)

    def _encode_framed(self, text: str) -> np.ndarray:
        encoding, id_of_rank = self._fast
        return id_of_rank[_ranks(encoding, text, _FRAME_TOKENS)]

    @cached_property
    def definition(self):
        """The `tokenizers.Tokenizer` whose ids are right by definition."""
        from tokenizers import Tokenizer as Definition
        from tokenizers import models, pre_tokenizers

        definition = Definition(models.BPE(*self._read()))
        definition.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return definition

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
            if content not in self.special_tokens:
                known = ", ".join(self.special_tokens)
                raise UserError(f"{path}: {key} {content!r} is no special token; known are {known}")
            setattr(self, attribute, self.special_tokens[content])

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, index in _read_vocab(self._folder / "vocab.json").items():
            table[index] = _token_to_bytes(token)
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


def _ranks(encoding, text: str, allowed_special: frozenset[str] = frozenset()) -> np.ndarray:
    return encoding.encode_to_numpy(text, allowed_special=allowed_special, disallowed_special=())


def _fast_path(vocab: dict[str, int], merges: list[tuple[str, str]], ends: tuple[int, int]):
    """A `tiktoken` encoding with the ids of its ranks (int32), or None where it would differ.

    BPE joins the pair of lowest rank that the merges list; tiktoken joins the pair whose joined text has
    the lowest rank, listed or not. The two agree when every byte is a token, no two merges make the same
    token, and every token, encoded alone, is itself. Proof: let x, y stand side by side in a reachable
    state, their joined text a token t. No merge has crossed the ends of t, so BPE on t alone passes
    through the state [x, y]; as it ends in t, its last merge is (x, y). So every pair that tiktoken sees
    is listed, with t's rank, and both choose the same one, the leftmost of equals.
    """
    import tiktoken
    from tokenizers import models

    letters = _byte_letters()
    made = [left + right for left, right in merges]
    tokens = [*letters, *made]
    if len(set(tokens)) != len(tokens) or not all(token in vocab for token in letters):
        return None
    definition = models.BPE(vocab, merges)
    if any(len(definition.tokenize(token)) != 1 for token in made):
        return None
    ranks = {_token_to_bytes(token): rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "aquila",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={_BEGIN: len(tokens), _END: len(tokens) + 1},
    )
    return encoding, np.array([*(vocab[token] for token in tokens), *ends], np.int32)


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in `vocab.json` (GPT-2's table), in byte order.

    Printable Latin-1 characters stand for themselves, the others for U+0100 and onwards in byte order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: 0x100 + i for i, byte in enumerate(others)}
    return {chr(shifted.get(byte, byte)): byte for byte in range(256)}


_LETTERS = _byte_letters()


def _token_to_bytes(token: str) -> bytes:
    try:
        return bytes([_LETTERS[letter] for letter in token])
    except KeyError:  # a token added as plain text
        return token.encode()


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path)
    if not vocab or not all(type(index) is int and index >= 0 for index in vocab.values()):
        raise UserError(f"{path}: must map each token to its id, a whole number")
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
