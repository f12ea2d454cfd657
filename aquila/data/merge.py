"""Several datasets of one tokenizer into one."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aquila.core.errors import UserError
from aquila.core.files import sha256, sync_file
from aquila.data.indexfile import Index, bin_path, idx_path, read_index, write_index
from aquila.data.loss_mask import mask_prefix, merge_masks
from aquila.data.meta import make_meta, meta_path, read_meta, write_meta

_COPY = 1 << 22


def merge_datasets(prefixes: Sequence[str], output: str) -> dict[str, int]:
    """Writes the documents of all `prefixes`, in order, to `output`; gives its counts.

    Raises `UserError` for datasets of different tokenizers or number types, and for ones without
    `.meta.json`, of which nobody can say whether they fit.
    """
    if output in prefixes:
        raise UserError(f"--output-prefix {output} is one of the inputs; choose another")
    indexes = [read_index(prefix) for prefix in prefixes]
    metas = [_meta(prefix) for prefix in prefixes]
    for prefix, index, meta in zip(prefixes, indexes, metas, strict=True):
        if meta["tokenizer"]["fingerprint"] != metas[0]["tokenizer"]["fingerprint"]:
            raise UserError(f"{prefix} and {prefixes[0]} were made with different tokenizers: not merged")
        if index.dtype != indexes[0].dtype:
            raise UserError(f"{prefix} holds {index.dtype}, {prefixes[0]} {indexes[0].dtype}: not merged")
    Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)
    mask = mask_prefix(output)
    for path in (idx_path(output), bin_path(mask), idx_path(mask)):
        path.unlink(missing_ok=True)  # of an older making
    facts = merge_masks(prefixes, indexes, metas, mask)
    finals = (bin_path(output), meta_path(output), idx_path(output))
    unfinished = [Path(f"{path}.tmp-{os.getpid()}") for path in finals]
    try:
        counts = _write(prefixes, indexes, metas, output, facts, *unfinished)
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
    return counts


def _meta(prefix: str) -> dict:
    meta = read_meta(prefix)
    if meta is None:
        raise UserError(f"{meta_path(prefix)} does not exist: nothing says which tokenizer made {prefix}")
    return meta


def _write(
    prefixes: Sequence[str],
    indexes: list[Index],
    metas: list[dict],
    output: str,
    mask: dict[str, Any] | None,
    bin_: Path,
    meta_: Path,
    idx: Path,
) -> dict[str, int]:
    digest = hashlib.sha256()
    with bin_.open("wb") as file:
        for prefix in prefixes:
            with bin_path(prefix).open("rb") as source:
                while chunk := source.read(_COPY):
                    digest.update(chunk)
                    file.write(chunk)
        sync_file(file)
    before = np.cumsum([0, *(len(index.lengths) for index in indexes)])
    documents = [index.documents[:-1] + start for index, start in zip(indexes, before, strict=False)]
    lengths = np.concatenate([index.lengths for index in indexes])
    with idx.open("wb") as file:
        write_index(file, lengths, np.concatenate([*documents, before[-1:]]), indexes[0].dtype.str)
        sync_file(file)
    numbers = [meta["counts"] for meta in metas]
    counts = {
        "documents": sum(len(index.documents) - 1 for index in indexes),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "min_id": min(count.get("min_id", 0) for count in numbers),
        "max_id": max(count["max_id"] for count in numbers),
    }
    meta = make_meta(
        metas[0]["tokenizer"],
        counts,
        [item for meta in metas for item in meta["inputs"]],
        merged_from=[str(prefix) for prefix in prefixes],
        bin_sha256=digest.hexdigest(),
        idx_sha256=sha256(idx),
        **({"loss_mask": mask} if mask else {}),
    )
    # The index comes last: without it the other files are no dataset.
    os.replace(bin_, bin_path(output))
    write_meta(meta_, meta)
    os.replace(meta_, meta_path(output))
    os.replace(idx, idx_path(output))
    return counts
