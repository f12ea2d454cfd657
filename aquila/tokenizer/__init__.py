"""Text to ids and back: Aquila's byte-level BPE, a SentencePiece model, or another model's `tokenizer.json`.

A byte-level folder holds `vocab.json`, `merges.txt` and, optionally, `special_tokens_map.json`; text is
split by GPT-2's pattern. A SentencePiece folder holds `tokenizer.model`. Eight special tokens follow the
last id of the vocabulary; `<|endoftext|>` stands for padding. A `tokenizer.json`, where there is no
other file, or one of another model's beside a `tokenizer.model`, keeps its own special tokens.
"""

from pathlib import Path

from aquila.core.errors import UserError
from aquila.core.text_files import read_json
from aquila.tokenizer.base import END_OF_TEXT, SPECIAL_TOKENS, DecodeStream, Tokenizer, surrogate_at
from aquila.tokenizer.bytepair import BytePairTokenizer
from aquila.tokenizer.fast import return_unused_memory
from aquila.tokenizer.json_tokenizer import JsonTokenizer
from aquila.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

__all__ = [
    "END_OF_TEXT",
    "SPECIAL_TOKENS",
    "BytePairTokenizer",
    "DecodeStream",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "has_tokenizer",
    "is_foreign",
    "load_tokenizer",
    "return_unused_memory",
    "surrogate_at",
]


def has_tokenizer(model_dir: str | Path) -> bool:
    """Whether a folder holds files that `load_tokenizer` reads."""
    return any(
        (Path(model_dir) / name).is_file() for name in ("vocab.json", "tokenizer.model", "tokenizer.json")
    )


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer of a model folder; nothing else in the folder is read.

    Raises `UserError` for a missing folder or file and for files that do not fit together.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; it must hold the tokenizer's files")
    if (folder / "vocab.json").is_file():
        return BytePairTokenizer(folder)
    if (folder / "tokenizer.json").is_file() and is_foreign(folder):
        return JsonTokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder)
    raise UserError(
        f"{folder} holds no tokenizer: give it vocab.json and merges.txt (byte-level BPE), tokenizer.model "
        "(SentencePiece), or another model's tokenizer.json"
    )


def is_foreign(folder: Path) -> bool:
    """Whether a folder's `tokenizer.json` is another model's, or stands alone: Aquila's have `[CLS]`."""
    if not (folder / "tokenizer.model").is_file():
        return True
    added = read_json(folder / "tokenizer.json").get("added_tokens") or []
    return not any(isinstance(token, dict) and token.get("content") == "[CLS]" for token in added)
