"""`PREFIX.meta.json`: who made a dataset, with which tokenizer, from what; and the checks before a run.

Neither torch nor Megatron is imported here: the launcher checks datasets before the first rank starts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import aquila
from aquila.core.errors import UserError
from aquila.core.files import sync_file
from aquila.core.text_files import read_json
from aquila.data.indexfile import Index, read_index, read_tokens
from aquila.data.loss_mask import check_mask
from aquila.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

FORMAT = 1
_SCAN = 1 << 22
"""Tokens looked at in one go while scanning for the largest id."""


def meta_path(prefix: str | Path) -> Path:
    """`PREFIX.meta.json`."""
    return Path(f"{prefix}.meta.json")


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `.meta.json` says of the tokenizer."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "special_tokens": tokenizer.special_tokens,
    }


def make_meta(
    tokenizer: dict[str, Any], counts: dict[str, int], inputs: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """The content of a `.meta.json`: `tokenizer` of `tokenizer_facts`, `counts` with `documents`,
    `tokens`, `min_id`, `max_id`; `inputs` with `path`, `size`, `sha256` of each file."""
    head = {"format": FORMAT, "made_by": f"aquila {aquila.__version__}"}
    return head | {"tokenizer": tokenizer, "counts": counts, "inputs": inputs} | more


def write_meta(path: Path, meta: dict[str, Any]) -> None:
    """Writes `meta` to `path`, and on to the disk: give the file its final name afterwards."""
    with path.open("wb") as file:
        file.write((json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode())
        sync_file(file)


def read_meta(prefix: str | Path) -> dict[str, Any] | None:
    """`PREFIX.meta.json`, or None where there is none. Raises `UserError` for a damaged one."""
    path = meta_path(prefix)
    if not path.is_file():
        return None
    meta = read_json(path)
    try:
        if meta["format"] > FORMAT:
            raise UserError(f"{path}: written by a newer version, {meta.get('made_by')}; update aquila")
        str(meta["tokenizer"]["fingerprint"]), int(meta["counts"]["tokens"]), int(meta["counts"]["max_id"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is no dataset description ({error}); make the dataset again") from None
    return meta


def check_datasets(prefixes: Sequence[str | Path], model_dir: Path, vocab_size: int) -> list[str]:
    """Whether a model folder of `vocab_size` ids can train on these datasets; returns what to note.

    A folder without a tokenizer can train, too: ids are then checked against the vocabulary alone.
    Raises `UserError` as `check_dataset`, and for a tokenizer with more ids than the model.
    """
    notes: list[str | None] = []
    tokenizer = None
    if has_tokenizer(model_dir):
        tokenizer = load_tokenizer(model_dir)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{model_dir}: its tokenizer has {tokenizer.vocab_size} ids, but config.json says "
                f"vocab_size {vocab_size}; one of them belongs to another model"
            )
    else:
        notes.append(
            f"{model_dir} holds no tokenizer: the data's ids are checked against its vocabulary alone"
        )
    notes += [check_dataset(prefix, tokenizer, vocab_size) for prefix in prefixes]
    return [note for note in notes if note]


def check_dataset(prefix: str | Path, tokenizer: Tokenizer | None, vocab_size: int) -> str | None:
    """Whether a model of `vocab_size` ids with this tokenizer can train on a dataset.

    A dataset without `.meta.json`, made by Megatron itself, is scanned for its largest id and accepted;
    the returned note says so. Raises `UserError` for missing, cut-off or damaged files, another
    tokenizer, and ids beyond the vocabulary.
    """
    index = read_index(prefix)
    if index.dtype.kind not in "iu":
        raise UserError(f"dataset {prefix}: holds {index.dtype} numbers, not token ids")
    meta = read_meta(prefix)
    if meta is None:
        lowest, highest = id_range(prefix, index)
        _check_ids(prefix, lowest, highest, vocab_size)
        return (
            f"dataset {prefix} has no .meta.json: nothing says which tokenizer made it; its ids "
            f"{lowest}..{highest} fit the vocabulary"
        )
    made, counts = meta["tokenizer"], meta["counts"]
    if counts["tokens"] != index.tokens:
        raise UserError(
            f"dataset {prefix}: {meta_path(prefix)} counts {counts['tokens']} tokens, the index "
            f"{index.tokens}; the files are not of one making, make the dataset again"
        )
    if tokenizer is not None and made["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"dataset {prefix} was made with another tokenizer (fingerprint {made['fingerprint'][:12]}, "
            f"{made.get('vocab_size')} ids) than the model's ({tokenizer.fingerprint[:12]}, "
            f"{tokenizer.vocab_size} ids); make it again with --model-dir of this model"
        )
    _check_ids(prefix, counts.get("min_id", 0), counts["max_id"], vocab_size)
    check_mask(prefix, index, meta)
    return None


def _check_ids(prefix: str | Path, lowest: int, highest: int, vocab_size: int) -> None:
    if lowest < 0 or highest >= vocab_size:
        wrong = highest if highest >= vocab_size else lowest
        raise UserError(
            f"dataset {prefix}: holds token id {wrong}, outside the model's vocabulary of {vocab_size} ids "
            "(vocab_size in config.json); was it made with another model's tokenizer?"
        )


def id_range(prefix: str | Path, index: Index) -> tuple[int, int]:
    """Smallest and largest id of a dataset, read in pieces; (0, -1) when it is empty."""
    tokens = read_tokens(prefix, index)
    if len(tokens) == 0:
        return 0, -1
    pieces = [tokens[start : start + _SCAN] for start in range(0, len(tokens), _SCAN)]
    return int(min(np.min(p) for p in pieces)), int(max(np.max(p) for p in pieces))
