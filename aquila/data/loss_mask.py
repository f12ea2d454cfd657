"""`PREFIX_loss_mask.bin/.idx`: which tokens of a dataset count in the loss, a byte each, 0 or 1.

The same documents of the same lengths as the dataset's, whose `.meta.json` says that there is a mask and
holds its checksums. A token's byte says whether predicting that token counts.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aquila.core.errors import UserError
from aquila.core.files import sha256, sync_file
from aquila.data.indexfile import Index, bin_path, idx_path, read_index, read_tokens, write_index
from aquila.tokenizer import Tokenizer

MASK_DTYPE = "|u1"


def mask_prefix(prefix: str | Path) -> str:
    """Prefix of the mask of a dataset."""
    return f"{prefix}_loss_mask"


def check_mask(prefix: str | Path, index: Index, meta: dict[str, Any] | None) -> dict[str, Any] | None:
    """What `.meta.json` says of the mask, `counted` tokens among it; None for a dataset without one.

    Raises `UserError` for files that are missing, damaged or of other lengths.
    """
    facts = meta.get("loss_mask") if meta else None
    if facts is None:
        return None
    if not isinstance(facts, dict) or type(facts.get("counted")) is not int:
        raise UserError(f"{prefix}.meta.json: loss_mask is damaged; make the dataset again")
    mask = read_index(mask_prefix(prefix))
    if mask.dtype != np.dtype(MASK_DTYPE) or not np.array_equal(mask.lengths, index.lengths):
        raise UserError(
            f"{mask_prefix(prefix)}: is not of the lengths of {prefix}; make the dataset again with "
            "--mask-prompts"
        )
    return facts


def mask_problems(prefix: str | Path, index: Index, meta: dict[str, Any]) -> list[str]:
    """What is wrong with the mask of a dataset, in sentences; reads every byte."""
    try:
        facts = check_mask(prefix, index, meta)
    except UserError as error:
        return [str(error)]
    if facts is None:
        return []
    path = mask_prefix(prefix)
    values = np.bincount(read_tokens(path, read_index(path)), minlength=2)
    if values[2:].any():
        return [f"{bin_path(path)}: holds other values than 0 and 1"]
    if values[1] != facts["counted"]:
        return [
            f"{prefix}.meta.json counts {facts['counted']} tokens in the loss, {bin_path(path)} {values[1]}"
        ]
    return []


def merge_masks(
    prefixes: Sequence[str], indexes: Sequence[Index], metas: Sequence[dict[str, Any]], output: str
) -> dict[str, Any] | None:
    """Writes the masks of datasets one after another, and what `.meta.json` says of it; None without any.

    Of a dataset that has none, all tokens count but the first of each document.
    """
    checks = [check_mask(*each) for each in zip(prefixes, indexes, metas, strict=True)]
    if not any(checks):
        return None
    counted = 0
    with bin_path(output).open("wb") as file:
        for prefix, index, facts in zip(prefixes, indexes, checks, strict=True):
            if facts:
                mask = np.array(read_tokens(mask_prefix(prefix), read_index(mask_prefix(prefix))))
            else:
                mask = np.ones(index.tokens, np.uint8)
                starts = index.offsets // index.dtype.itemsize
                mask[starts[index.lengths > 0]] = 0
            counted += int(mask.sum(dtype=np.int64))
            file.write(mask.tobytes())
        sync_file(file)
    with idx_path(output).open("wb") as file:
        write_index(file, np.concatenate([index.lengths for index in indexes]), dtype=MASK_DTYPE)
        sync_file(file)
    return {
        "counted": counted,
        "bin_sha256": sha256(bin_path(output)),
        "idx_sha256": sha256(idx_path(output)),
    }


def marked(ids: Sequence[int], counted: np.ndarray | None, tokenizer: Tokenizer | None) -> str:
    """The text of `ids`, or their numbers, with what counts in the loss between ⟦ and ⟧."""

    def text(part: Sequence[int]) -> str:
        return tokenizer.decode(part, skip_special=False) if tokenizer else " ".join(map(str, part))

    if counted is None:
        return text(ids)
    cuts = [0, *(np.flatnonzero(np.diff(counted.astype(int))) + 1).tolist(), len(ids)]
    runs = [
        (text(ids[start:stop]), bool(counted[start]))
        for start, stop in itertools.pairwise(cuts)
        if stop > start
    ]
    return ("" if tokenizer else " ").join(f"⟦{run}⟧" if counts else run for run, counts in runs)
