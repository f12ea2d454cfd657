"""Text to ids and back: Aquila's byte-level BPE, or a SentencePiece model, by the files in a folder.

A byte-level folder holds `vocab.json`, `merges.txt` and, optionally, `special_tokens_map.json`; text is
split by GPT-2's pattern. A SentencePiece folder holds `tokenizer.model`. Eight special tokens follow the
last id of the vocabulary; `<|endoftext|>` stands for padding.
"""

from pathlib import Path

from aquila.core.errors import UserError
from aquila.tokenizer.base import END_OF_TEXT, SPECIAL_TOKENS, DecodeStream, Tokenizer, surrogate_at
from aquila.tokenizer.bytepair import BytePairTokenizer
from aquila.tokenizer.fast import return_unused_memory
from aquila.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

__all__ = [
    "END_OF_TEXT",
    "SPECIAL_TOKENS",
    "BytePairTokenizer",
    "DecodeStream",
    "SentencePieceTokenizer",
    "Tokenizer",
    "has_tokenizer",
    "load_tokenizer",
    "return_unused_memory",
    "surrogate_at",
]


def has_tokenizer(model_dir: str | Path) -> bool:
    """Whether a folder holds files that `load_tokenizer` reads."""
    return any((Path(model_dir) / name).is_file() for name in ("vocab.json", "tokenizer.model"))


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
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
