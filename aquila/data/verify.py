"""Every check of a dataset that can be made: structure, sizes, ids, framing, checksums."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from aquila.core.errors import UserError
from aquila.core.files import sha256
from aquila.data.indexfile import Index, bin_path, idx_path, read_index, read_tokens
from aquila.data.loss_mask import mask_prefix, mask_problems
from aquila.data.meta import id_range, meta_path, read_meta

_CHUNK = 1 << 20


def verify_dataset(prefix: str | Path, vocab_size: int | None = None) -> list[str]:
    """What is wrong with a dataset, in sentences; an empty list for a good one.

    `vocab_size`: the model's; without it, the tokenizer's of `.meta.json`. Reads every byte.
    """
    try:
        index, meta = read_index(prefix), read_meta(prefix)
    except UserError as error:
        return [str(error)]
    problems = list(_index_problems(prefix, index))
    if meta is not None:
        problems += _checksum_problems(prefix, meta)
        problems += _count_problems(prefix, meta, index)
    if problems:
        return problems  # the tokens cannot be told apart by a damaged index
    limit = vocab_size or (meta["tokenizer"]["vocab_size"] if meta else None)
    lowest, highest = id_range(prefix, index)
    if lowest < 0 or (limit is not None and highest >= limit):
        wrong = lowest if lowest < 0 else highest
        problems.append(f"{bin_path(prefix)}: token id {wrong} is outside the vocabulary of {limit} ids")
    if meta is not None:
        problems += _framing_problems(prefix, index, meta["tokenizer"])
        problems += mask_problems(prefix, index, meta)
        if not problems and meta.get("loss_mask"):
            problems += _checksum_problems(mask_prefix(prefix), meta["loss_mask"])
    return problems


def _index_problems(prefix: str | Path, index: Index) -> Iterator[str]:
    path, count = idx_path(prefix), len(index.lengths)
    expected = 0
    for start in range(0, count, _CHUNK):
        lengths = index.lengths[start : start + _CHUNK]
        ends = expected + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        offsets = np.concatenate(([expected], ends[:-1]))
        wrong = np.flatnonzero((index.offsets[start : start + _CHUNK] != offsets) | (lengths < 0))
        if len(wrong):
            yield f"{path}: sequence {start + int(wrong[0])} does not begin where the one before it ends"
            return
        expected = int(ends[-1])
    if expected != bin_path(prefix).stat().st_size:
        yield f"{path}: its lengths add up to {expected} bytes, {bin_path(prefix)} has another size"
    if np.any(index.documents[:-1] > index.documents[1:]) or np.any(index.documents > count):
        yield f"{path}: the document index is not in order"


def _checksum_problems(prefix: str | Path, meta: dict) -> Iterator[str]:
    for path, key in ((bin_path(prefix), "bin_sha256"), (idx_path(prefix), "idx_sha256")):
        if key in meta and sha256(path) != meta[key]:
            yield f"{path}: its content is not what was written (its SHA-256 is not that of .meta.json)"


def _count_problems(prefix: str | Path, meta: dict, index: Index) -> Iterator[str]:
    here = {"documents": len(index.documents) - 1, "tokens": index.tokens}
    for key, count in here.items():
        if meta["counts"].get(key) != count:
            said = meta["counts"].get(key)
            yield f"{meta_path(prefix)} counts {said} {key}, {idx_path(prefix)} {count}"


def _framing_problems(prefix: str | Path, index: Index, tokenizer: dict) -> Iterator[str]:
    """Each document begins with `[CLS]` and ends with `</s>`."""
    tokens = read_tokens(prefix, index)
    firsts = index.offsets[index.documents[:-1]] // index.dtype.itemsize
    ends = np.append(firsts[1:], len(tokens))
    for start in range(0, len(firsts), _CHUNK):
        first, last = firsts[start : start + _CHUNK], ends[start : start + _CHUNK] - 1
        wrong = (last < first) | (tokens[np.minimum(first, len(tokens) - 1)] != tokenizer["bos_id"])
        wrong |= tokens[last] != tokenizer["eos_id"]
        if np.any(wrong):
            number = start + int(np.flatnonzero(wrong)[0])
            yield f"{bin_path(prefix)}: document {number} is not framed as [CLS] ... </s>"
            return
