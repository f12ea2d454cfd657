"""Tokenizer files of both worlds: Aquila's `vocab.json` and `merges.txt`, Hugging Face's `tokenizer.json`."""

import json
import shutil
from pathlib import Path
from typing import Any

from aquila.core.errors import UserError
from aquila.core.files import replacing
from aquila.core.text_files import read_json
from aquila.model.hf_sentencepiece import from_pieces
from aquila.tokenizer import (
    BytePairTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    is_foreign,
    load_tokenizer,
)

RELEASED_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.model")
_FOREIGN_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""The files of a tokenizer that stays as another model has it."""


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Readable JSON, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode())


def copy_released(source: Path, target: Path) -> Tokenizer:
    """Puts the tokenizer of `source` into `target` in the released files.

    A folder that has Aquila's `tokenizer.json` alone gets its `vocab.json` and `merges.txt` out of it;
    another model's stays as it is. Raises `UserError` for a tokenizer that cannot be read here.
    """
    if (source / "vocab.json").is_file():
        names = RELEASED_FILES
    elif (source / "tokenizer.json").is_file() and is_foreign(source):
        if _splits_as_gpt2(read_json(source / "tokenizer.json")):
            _unpack(source, target)
            return load_tokenizer(target)
        names = _FOREIGN_FILES
    else:
        names = RELEASED_FILES
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return load_tokenizer(target)


def _splits_as_gpt2(content: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is Aquila's byte-level BPE: GPT-2's pattern, `[CLS]` among its tokens."""
    splitting, model = content.get("pre_tokenizer") or {}, content.get("model") or {}
    plain = splitting.get("type") == "ByteLevel" and not content.get("normalizer")
    plain = plain and splitting.get("use_regex", True) and not splitting.get("add_prefix_space", True)
    added = {token.get("content") for token in content.get("added_tokens") or []}
    return plain and ("[CLS]" in added or "[CLS]" in (model.get("vocab") or {}))


def _unpack(source: Path, target: Path) -> None:
    path = source / "tokenizer.json"
    model = read_json(path).get("model", {})
    if model.get("type") != "BPE" or "merges" not in model or model.get("byte_fallback"):
        raise UserError(f"{path}: only a byte-level BPE can be turned into vocab.json and merges.txt")
    write_json(target / "vocab.json", model["vocab"])
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    with replacing(target / "merges.txt") as file:
        file.write("".join(f"{line}\n" for line in ("#version: 0.2", *merges)).encode())


def write_hf(tokenizer: Tokenizer, source: Path, target: Path, max_length: int) -> None:
    """Files with which `AutoTokenizer` gives the ids of `tokenizer`, and its bos, eos and pad.

    As here, no token is put around a text, and a special token written out in a text stays text. Raises
    `UserError` for a tokenizer whose ids `tokenizer.json` cannot give.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return  # its files are there, as they came
    if isinstance(tokenizer, SentencePieceTokenizer):
        shutil.copyfile(source / "tokenizer.model", target / "tokenizer.model")
        whole = from_pieces(tokenizer)
    elif isinstance(tokenizer, BytePairTokenizer):
        whole = _byte_level(tokenizer)
    else:
        raise TypeError(type(tokenizer))
    _add_specials(whole, tokenizer)
    with replacing(target / "tokenizer.json") as file:
        file.write(whole.to_str(pretty=False).encode())
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    marks = {"bos_token": names[tokenizer.bos_id], "eos_token": names[tokenizer.eos_id]}
    if isinstance(tokenizer, SentencePieceTokenizer):
        pad = tokenizer.pieces()[tokenizer.pad_id]
        if not pad.is_text:
            names.setdefault(tokenizer.pad_id, pad.text)
    if tokenizer.pad_id in names:
        marks["pad_token"] = marks["unk_token"] = names[tokenizer.pad_id]
    write_json(
        target / "special_tokens_map.json",
        {**marks, "cls_token": marks["bos_token"], "sep_token": marks["eos_token"]},
    )
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **marks,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "add_eos_token": False,
            "model_max_length": max_length,
        },
    )


def _byte_level(tokenizer: BytePairTokenizer) -> Any:
    """A copy of the definition, as the running one stays as it is, that decodes."""
    from tokenizers import Tokenizer as Definition
    from tokenizers import decoders

    whole = Definition.from_str(tokenizer.definition.to_str())
    whole.decoder = decoders.ByteLevel()
    return whole


def _add_specials(whole: Any, tokenizer: Tokenizer) -> None:
    from tokenizers import AddedToken

    specials = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    whole.add_special_tokens([AddedToken(name, special=True, normalized=False) for name, _ in specials])
    for name, index in specials:
        if whole.token_to_id(name) != index:
            raise UserError(
                f"special token {name} has id {index} here; tokenizer.json would give it "
                f"{whole.token_to_id(name)}: ids between the vocabulary and the special tokens are missing"
            )
