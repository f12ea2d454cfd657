"""Reading documents: what is damaged, cut or replaced is named."""

import os

import numpy as np
import pytest

from aquila.core.errors import UserError
from aquila.data.documents import Documents
from aquila.data.indexed import open_corpora
from aquila.data.indexfile import HEADER
from tests.unit.data.conftest import numbered, write_dataset


def change_offset(prefix, document, value):
    path = prefix.with_suffix(".idx")
    data = bytearray(path.read_bytes())
    count = HEADER.unpack(data[: HEADER.size])[3]
    at = HEADER.size + 4 * count + 8 * document
    data[at : at + 8] = np.int64(value).tobytes()
    path.write_bytes(data)


def test_reads_parts(make_dataset):
    documents = numbered(20)
    source = Documents(make_dataset(documents))
    assert len(source) == 20
    for i, document in enumerate(documents):
        assert source.read(i, 0, len(document)).tolist() == list(document)
        assert source.read(i, 1, len(document)).tolist() == list(document[1:])
    assert source.tokens_before(20) == sum(map(len, documents))


@pytest.mark.parametrize("value", [-16, 10**15, 2, 0])
def test_an_offset_that_does_not_fit_is_named(make_dataset, value):
    prefix = make_dataset(numbered(20))
    change_offset(prefix, 5, value)
    source = Documents(prefix)
    for document in (4, 5):
        with pytest.raises(UserError, match=rf"\.idx: document {document} "):
            source.read(document, 0, 1)
    source.read(7, 0, 1)


def test_a_bin_cut_while_it_is_read_is_named(make_dataset):
    prefix = make_dataset(numbered(20))
    source = Documents(prefix)
    os.truncate(prefix.with_suffix(".bin"), 40)
    with pytest.raises(UserError, match=r"\.bin: document 19 needs it up to byte .* it was cut"):
        source.read(19, 0, 1)


def test_an_idx_cut_or_replaced_while_it_is_used_ends_no_process(make_dataset):
    prefix = make_dataset(numbered(20))
    source = Documents(prefix)
    write_dataset(prefix.with_name("other"), numbered(3))
    os.replace(prefix.with_name("other.idx"), prefix.with_suffix(".idx"))
    assert len(source.read(19, 0, 1)) == 1  # the old file, for as long as it is open
    source = Documents(write_dataset(prefix, numbered(5000)))
    os.truncate(prefix.with_suffix(".idx"), 60)  # a map of it would end this process
    with pytest.raises(UserError, match=r"\.idx: document 4,999 needs it up to byte .* it was cut"):
        source.read(4999, 0, 1)


def test_a_file_system_without_maps(make_dataset, monkeypatch):
    prefix = make_dataset(numbered(20))

    def refused(*_, **__):
        raise OSError(19, "No such device")

    monkeypatch.setattr(np, "memmap", refused)
    assert Documents(prefix).read(3, 0).tolist() == list(numbered(20)[3])


def test_an_id_beyond_the_vocabulary_names_dataset_and_document(make_dataset):
    prefix = make_dataset([[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 77, 11, 12, 13, 14, 15, 16]])
    stream = open_corpora([str(prefix)], "100", 4, 1, ids=77).train
    with pytest.raises(UserError, match=r"\.bin: document 1 holds id 77, and the model's vocabulary has 77"):
        [stream[k] for k in range(stream.samples_per_epoch)]
    stream = open_corpora([str(prefix)], "100", 4, 1, ids=78).train
    assert len([stream[k] for k in range(stream.samples_per_epoch)]) == 4


def test_a_prefix_with_its_extension_is_told(make_dataset):
    prefix = make_dataset(numbered(5))
    for kind in ("bin", "idx"):
        with pytest.raises(UserError, match=f"named without .{kind}: {prefix}$"):
            Documents(f"{prefix}.{kind}")
