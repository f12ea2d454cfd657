"""Trains a byte-level BPE tokenizer on JSONL text and writes it in Aquila's file formats."""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from aquila.core.errors import UserError, run_command
from aquila.core.files import write_atomically
from aquila.core.text_files import text_under
from aquila.tokenizer import END_OF_TEXT, SPECIAL_TOKENS


def train(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[str]]:
    """Vocabulary (token to id, in id order) and merges of a BPE over `texts`.

    `vocab_size` counts the special tokens that follow the last id. `<|endoftext|>` is 0, the 256 bytes
    come next, then the merges in their order.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        # Else a small corpus would make tokens of whole sentences.
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    return vocab, [" ".join(pair) for pair in model["merges"]]


def write_tokenizer(folder: Path, vocab: dict[str, int], merges: list[str]) -> None:
    """`vocab.json`, `merges.txt` and `special_tokens_map.json`, each replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False, separators=(",", ":")))
    write_atomically(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    ends = {"cls_token": {"content": "[CLS]"} | flags, "sep_token": {"content": "</s>"} | flags}
    write_atomically(folder / "special_tokens_map.json", json.dumps(ends, indent=2) + "\n")


def _texts(paths: list[Path], key: str) -> Iterator[str]:
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    yield text_under(line, key, f"{path}, line {number}")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.train_tokenizer", description=__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSONL files")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=2048, help="special tokens included; default: 2048")
    parser.add_argument("--json-key", default="text", help="default: %(default)s")
    arguments = parser.parse_args()
    vocab, merges = train(_texts(arguments.input, arguments.json_key), arguments.vocab_size)
    write_tokenizer(arguments.output_dir, vocab, merges)
    print(
        f"{arguments.output_dir}: {len(vocab):,} tokens, {len(merges):,} merges, 8 special tokens after them"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
