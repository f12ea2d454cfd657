"""A SentencePiece model as `tokenizer.json`, refused where the ids would not be the trained ones."""

from typing import Any

from aquila.core.errors import UserError
from aquila.tokenizer import SentencePieceTokenizer
from aquila.tokenizer.fast import PROBE
from aquila.tokenizer.sentencepiece_tokenizer import Piece

_UNKNOWN, _CONTROL, _BYTE = 2, 3, 6
_SPACE = "\u2581"
_TEXTS = (
    PROBE, "", " ", "  two", " x", "x ", "a  b   c ", "\tx\n\ny", "▁▁a ▁", "<s></s><unk><0x41>", "ﬁ ① Å ½ ｶﾞ",
    "The quick brown fox jumps over the lazy dog; 将进酒，杯莫停。与君歌一曲，请君为我倾耳听。",
)  # fmt: skip


def from_pieces(tokenizer: SentencePieceTokenizer) -> Any:
    """A `tokenizers.Tokenizer` with the ids of `tokenizer`.

    Raises `UserError` when it would give other ids: the model rewrites its text before it splits it, or has
    entries that `tokenizers` reads otherwise.
    """
    from tokenizers import Tokenizer as Definition
    from tokenizers import decoders, normalizers

    pieces = tokenizer.pieces()
    first = [normalizers.Prepend(_SPACE)] if tokenizer.adds_first_space else []
    start = [decoders.Strip(" ", 1, 0)] if tokenizer.adds_first_space else []
    wrong = ""
    # The file does not say by which algorithm it splits: scores of BPE are ranks, those of a Unigram model
    # are logarithms of frequencies.
    for model in (_bpe(pieces), _unigram(pieces)):
        whole = Definition(model)
        whole.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
        whole.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *start]
        )
        text = next((text for text in _TEXTS if whole.encode(text).ids != tokenizer.encode(text)), None)
        if text is None:
            return whole
        wrong = wrong or text
    raise UserError(
        f"this SentencePiece model cannot be exported to tokenizer.json: tokenizers would give "
        f"other ids than those of training, for {wrong[:20]!r} for instance. To export the weights alone, "
        "convert a copy of the folder without tokenizer.model"
    )


def _texts(pieces: list[Piece]) -> list[str]:
    """The entries as `tokenizers` may know them.

    Control entries match no text, and some share a name with a special token that follows the last id: they
    get names that no text has, of noncharacters.
    """
    return [f"\U0010fffe{i}\U0010fffe" if p.kind == _CONTROL else p.text for i, p in enumerate(pieces)]


def _bpe(pieces: list[Piece]) -> Any:
    """Every way to join two entries into a third, by the third's score: the higher is joined first."""
    from tokenizers import models

    vocab = {text: index for index, text in enumerate(_texts(pieces))}
    merges = []
    for index, piece in enumerate(pieces):
        if piece.kind in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        halves = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
        whole = [(left, right) for left, right in halves if left in vocab and right in vocab]
        whole.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-piece.score, index, pair) for pair in whole]
    merges.sort(key=lambda merge: merge[:2])
    return models.BPE(
        vocab,
        [pair for _, _, pair in merges],
        unk_token=next(piece.text for piece in pieces if piece.kind == _UNKNOWN),
        fuse_unk=True,
        byte_fallback=any(piece.kind == _BYTE for piece in pieces),
    )


def _unigram(pieces: list[Piece]) -> Any:
    from tokenizers import models

    return models.Unigram(
        [(text, piece.score) for text, piece in zip(_texts(pieces), pieces, strict=True)],
        next(index for index, piece in enumerate(pieces) if piece.kind == _UNKNOWN),
        any(piece.kind == _BYTE for piece in pieces),
    )
