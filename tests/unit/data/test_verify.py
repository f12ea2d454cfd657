"""Damage of every kind is found and named."""

import json

import numpy as np
import pytest

from aquila.core.errors import UserError
from aquila.data.indexfile import bin_path, idx_path
from aquila.data.merge import merge_datasets
from aquila.data.meta import meta_path
from aquila.data.prepare.pipeline import PrepareOptions, make_datasets
from aquila.data.verify import verify_dataset
from aquila.tokenizer import load_tokenizer
from tests.unit.data.conftest import write_dataset


@pytest.fixture(scope="module")
def tokenizer(root):
    return load_tokenizer(root / "checkpoints_in/aquila-tiny")


@pytest.fixture
def made(tokenizer, tmp_path):
    def make(name="d", count=5):
        lines = "".join(json.dumps({"text": f"{name} {i} + 1 = {i + 1}."}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text(lines)
        make_datasets(PrepareOptions([str(tmp_path / f"{name}.jsonl")], str(tmp_path / name)), tokenizer)
        return tmp_path / f"{name}_text_document"

    return make


def test_good_datasets(made, tmp_path):
    assert verify_dataset(made()) == []
    assert verify_dataset(write_dataset(tmp_path / "bare", [[1, 2], [3]])) == []


def test_every_flipped_bit_of_the_index_is_found(made):
    path = idx_path(made())
    good = path.read_bytes()
    prefix = str(path)[:-4]
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert verify_dataset(prefix), f"bit {bit}"


def test_flipped_bit_of_the_index_is_found_without_checksums(tmp_path):
    prefix = write_dataset(tmp_path / "bare", [[1, 2], [3], [4, 5, 6]])
    good = idx_path(prefix).read_bytes()
    for byte in range(len(good)):
        data = bytearray(good)
        data[byte] ^= 4
        idx_path(prefix).write_bytes(data)
        # The one byte that cannot be told: a document index entry may rightly be any number in order.
        assert verify_dataset(prefix) or byte in range(len(good) - 32, len(good)), byte


def test_damaged_tokens(made):
    prefix = made()
    tokens = np.fromfile(bin_path(prefix), np.int32)
    for position, value, message in ((3, 5000, "SHA-256"), (0, 7, "SHA-256")):
        changed = tokens.copy()
        changed[position] = value
        changed.tofile(bin_path(prefix))
        assert message in verify_dataset(prefix)[0]


def test_ids_and_framing_without_checksums(made):
    prefix = made()
    meta = json.loads(meta_path(prefix).read_text())
    del meta["bin_sha256"]
    meta_path(prefix).write_text(json.dumps(meta))
    tokens = np.fromfile(bin_path(prefix), np.int32)
    for position, value, message in ((3, 5000, "outside the vocabulary"), (0, 7, "document 0 is not framed")):
        changed = tokens.copy()
        changed[position] = value
        changed.tofile(bin_path(prefix))
        assert message in verify_dataset(prefix)[0]


def test_cut_off_bin(made):
    prefix = made()
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-4])
    assert "cut off" in verify_dataset(prefix)[0]


def test_merge(made, tmp_path):
    a, b = made("a", 3), made("b", 4)
    counts = merge_datasets([str(a), str(b)], str(tmp_path / "all"))
    assert counts["documents"] == 7
    assert bin_path(tmp_path / "all").read_bytes() == bin_path(a).read_bytes() + bin_path(b).read_bytes()
    assert verify_dataset(tmp_path / "all") == []
    assert len(json.loads(meta_path(tmp_path / "all").read_text())["inputs"]) == 2
    assert not list(tmp_path.glob("*.tmp*"))


def test_merge_refuses_what_does_not_fit(made, tmp_path):
    a, b = made("a"), made("b")
    with pytest.raises(UserError, match="one of the inputs"):
        merge_datasets([str(a), str(b)], str(a))
    meta = json.loads(meta_path(b).read_text())
    meta["tokenizer"]["fingerprint"] = "1" * 64
    meta_path(b).write_text(json.dumps(meta))
    with pytest.raises(UserError, match="different tokenizers"):
        merge_datasets([str(a), str(b)], str(tmp_path / "all"))
    meta_path(b).unlink()
    with pytest.raises(UserError, match="nothing says which tokenizer"):
        merge_datasets([str(a), str(b)], str(tmp_path / "all"))
    assert not list(tmp_path.glob("all*"))
