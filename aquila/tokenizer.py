"""Text to ids and back: Aquila's byte-level BPE, or a SentencePiece model, by the files in a folder.

A byte-level folder holds `vocab.json`, `merges.txt` and, optionally, `special_tokens_map.json`; text is
split by GPT-2's pattern. A SentencePiece folder holds `tokenizer.model`. Eight special tokens follow the
last id of the vocabulary; `<|endoftext|>` stands for padding.

`tokenizers` defines the ids of byte-level BPE. Where the vocabulary allows it (`_fast_path` says when),
`tiktoken` computes the same ids several times as fast.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from aquila.errors import UserError

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

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's splitting pattern (Radford et al. 2019), whose pieces BPE never joins."""

_LONG = 1 << 20
"""Texts above this many characters are encoded in pieces, so that memory follows the ids, not the text."""

# A letter or digit, then a space or punctuation: the pattern always ends a piece between the two, and
# looks at nothing to the left, so text may be cut there without any change of its ids. The second set is
# spelled out because what counts as a letter differs between Unicode versions.
_CUT = re.compile(r"[^\W_](?=[ \t\n.,;:!?()，。、；：！？])")


def load_tokenizer(model_dir: str | Path) -> "Tokenizer":
    """The tokenizer of a model folder; nothing else in the folder is read.

    Raises `UserError` for a missing folder or file and for files that do not fit together.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; it must hold the tokenizer's files")
    if (folder / "vocab.json").is_file():
        return BytePairTokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder)
    raise UserError(
        f"{folder} holds no tokenizer: give it vocab.json and merges.txt (byte-level BPE), "
        "or tokenizer.model (SentencePiece)"
    )


class Tokenizer:
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

    _bytes: list[bytes]
    """UTF-8 bytes of each id."""

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text` as int32, without specials. Raises `UserError` for a lone surrogate."""
        raise NotImplementedError

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

    _strip_first_space = False

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


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE with GPT-2's pattern: `vocab.json`, `merges.txt`, `special_tokens_map.json`."""

    def __init__(self, folder: Path, *, fast: bool = True) -> None:
        self._vocab = _read_vocab(folder / "vocab.json")
        self._merges = _read_merges(folder / "merges.txt", self._vocab)
        self._place_specials(self._vocab, max(self._vocab.values()) + 1)
        self._name_ends(folder / "special_tokens_map.json")
        self.fingerprint = _fingerprint("byte-level-bpe", self._vocab, self._merges, self.special_tokens)
        self._bytes = self._byte_table()
        self._definition = None
        self._fast = _fast_path(self._vocab, self._merges, self.special_tokens) if fast else None

    @property
    def is_fast(self) -> bool:
        """Whether `tiktoken` computes the ids."""
        return self._fast is not None

    def encode_array(self, text: str) -> np.ndarray:
        return _refusing_surrogates(self._encode, text)

    def _encode(self, text: str) -> np.ndarray:
        if self._fast is None:
            ids = [np.array(self.definition.encode(part).ids, np.int32) for part in _pieces(text)]
        else:
            encoding, id_of_rank = self._fast
            ids = [id_of_rank[_ranks(encoding, part)] for part in _pieces(text)]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    @property
    def definition(self):
        """The `tokenizers.Tokenizer` whose ids are right by definition."""
        if self._definition is None:
            from tokenizers import Tokenizer as Definition
            from tokenizers import models, pre_tokenizers

            self._definition = Definition(models.BPE(self._vocab, self._merges))
            self._definition.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return self._definition

    def _name_ends(self, path: Path) -> None:
        """Lets `special_tokens_map.json`, where there is one, name the tokens around a document."""
        if not path.is_file():
            return
        named = _read_json(path)
        for key, attribute in (("cls_token", "bos_id"), ("sep_token", "eos_id")):
            entry = named.get(key)
            content = entry.get("content") if isinstance(entry, dict) else entry
            if content is None:
                continue
            if content not in self.special_tokens:
                known = ", ".join(self.special_tokens)
                raise UserError(f"{path}: {key} {content!r} is no special token; known are {known}")
            setattr(self, attribute, self.special_tokens[content])

    def _byte_table(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, index in self._vocab.items():
            table[index] = _token_to_bytes(token)
        for name, index in self.special_tokens.items():
            table[index] = name.encode()
        return table


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, `tokenizer.model`; the special tokens follow its last id."""

    def __init__(self, folder: Path) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                f"{folder}/tokenizer.model is a SentencePiece model: run `pip install sentencepiece`"
            ) from None
        path = folder / "tokenizer.model"
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model: {error}") from None
        pieces = [self._model.id_to_piece(i) for i in range(self._model.vocab_size())]
        # The model's own control pieces, `</s>` among them, stay unused: the eight follow its last id.
        self._place_specials({}, len(pieces))
        content = hashlib.sha256(self._model.serialized_model_proto()).hexdigest()
        self.fingerprint = _fingerprint("sentencepiece", content, self.special_tokens)
        self._bytes = [self._piece_to_bytes(i, piece) for i, piece in enumerate(pieces)]
        self._bytes += [b""] * (self.vocab_size - len(pieces))
        for name, index in self.special_tokens.items():
            self._bytes[index] = name.encode()
        # The model's own first space, if it adds one to every text, is taken away again in decoding.
        self._strip_first_space = self._model.decode([self._model.piece_to_id("\u2581")]) == ""

    def encode_array(self, text: str) -> np.ndarray:
        return _refusing_surrogates(lambda whole: np.array(self._model.encode(whole), np.int32), text)

    def _piece_to_bytes(self, index: int, piece: str) -> bytes:
        if self._model.is_byte(index):
            return bytes([int(piece[3:-1], 16)])
        if self._model.is_control(index):
            return b""
        if self._model.is_unknown(index):
            return self._model.decode([index]).encode()
        return piece.replace("\u2581", " ").encode()


def _refusing_surrogates(encode, text: str) -> np.ndarray:
    try:
        return encode(text)
    except (UnicodeEncodeError, TypeError, RuntimeError):  # of tiktoken, tokenizers, sentencepiece
        if isinstance(text, str) and (found := re.search("[\ud800-\udfff]", text)):
            code = f"U+{ord(found.group()):04X}"
            raise UserError(
                f"character {found.start()} is {code}, half of a surrogate pair, which is no text"
            ) from None
        raise


def _pieces(text: str) -> list[str]:
    """`text` in parts of about `_LONG` characters that can be encoded one by one with the same ids."""
    if len(text) <= _LONG:
        return [text]
    parts, start = [], 0
    while len(text) - start > _LONG and (cut := _CUT.search(text, start + _LONG)):
        parts.append(text[start : cut.end()])
        start = cut.end()
    return [*parts, text[start:]]


def _ranks(encoding, text: str) -> np.ndarray:
    return encoding.encode_to_numpy(text, allowed_special=_NONE, disallowed_special=())


_NONE: frozenset[str] = frozenset()


def _fast_path(vocab: dict[str, int], merges: list[tuple[str, str]], specials: dict[str, int]):
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
    # tiktoken searches text for special tokens unless it knows none; one that is never allowed is cheap.
    encoding = tiktoken.Encoding(
        "aquila", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|never|>": len(tokens)}
    )
    return encoding, np.array([vocab[token] for token in tokens], np.int32)


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


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return data


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = _read_json(path)
    if not vocab or not all(type(index) is int and index >= 0 for index in vocab.values()):
        raise UserError(f"{path}: must map each token to its id, a whole number")
    if len(set(vocab.values())) != len(vocab):
        raise UserError(f"{path}: two tokens share an id")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: byte-level BPE needs it beside vocab.json")
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise UserError(f"{path}, line {number}: {line!r} is no pair of tokens of vocab.json")
        merges.append(pair)
    return merges


def _fingerprint(*content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
