"""SentencePiece models."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aquila.core.errors import UserError
from aquila.tokenizer.base import Tokenizer, fingerprint, refusing_surrogates


class Piece(NamedTuple):
    """An entry of a SentencePiece model; `kind` by its format's numbers."""

    text: str
    score: float
    kind: int

    @property
    def is_text(self) -> bool:
        """Whether a text can hold it."""
        return self.kind == 1


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
            self._model.id_to_piece(list(range(self._model.vocab_size())))  # each must be UTF-8
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a SentencePiece model: {error}") from None
        # The model's own control pieces, `</s>` among them, stay unused: the eight follow its last id.
        self._place_specials({}, self._model.vocab_size())
        content = hashlib.sha256(self._model.serialized_model_proto()).hexdigest()
        self.fingerprint = fingerprint("sentencepiece", content, self.special_tokens)
        # The model's own first space, if it adds one to every text, is taken away again in decoding.
        self._strip_first_space = self._model.decode([self._model.piece_to_id("\u2581")]) == ""

    @property
    def adds_first_space(self) -> bool:
        """Whether the model puts a space before every text."""
        return self._strip_first_space

    def pieces(self) -> list[Piece]:
        """The entries in the order of their ids; kind 1 is text, 2 unknown, 3 control, 5 unused, 6 a byte."""
        model = self._model
        kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6))
        return [
            Piece(
                model.id_to_piece(i), model.get_score(i), next((kind for test, kind in kinds if test(i)), 1)
            )
            for i in range(model.vocab_size())
        ]

    def encode_array(self, text: str) -> np.ndarray:
        return refusing_surrogates(lambda whole: np.array(self._model.encode(whole), np.int32), text)

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [self._piece_to_bytes(i) for i in range(self._model.vocab_size())]
        return table + [name.encode() for name in self.special_tokens]

    def _piece_to_bytes(self, index: int) -> bytes:
        if self._model.is_byte(index):
            return bytes([int(self._model.id_to_piece(index)[3:-1], 16)])
        if self._model.is_control(index):
            return b""
        if self._model.is_unknown(index):
            return self._model.decode([index]).encode()
        return self._model.id_to_piece(index).replace("\u2581", " ").encode()
