"""Small datasets with known tokens."""

from pathlib import Path

import numpy as np
import pytest

from aquila.data.indexfile import bin_path, idx_path, write_index


def write_dataset(prefix: Path, documents: list[list[int]]) -> Path:
    """A dataset without `.meta.json` that holds these documents."""
    lengths = np.array([len(d) for d in documents], np.int32)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    bin_path(prefix).write_bytes(np.array([t for d in documents for t in d], np.int32).tobytes())
    with idx_path(prefix).open("wb") as file:
        write_index(file, lengths)
    return prefix


def numbered(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """`count` documents of random length in which every token of the corpus is different."""
    lengths = np.random.RandomState(seed).randint(1, longest + 1, count)
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


@pytest.fixture
def make_dataset(tmp_path):
    """`make_dataset(documents, name)` writes a dataset and gives its prefix."""
    return lambda documents, name="corpus": write_dataset(tmp_path / name, documents)
