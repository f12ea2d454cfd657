"""One bad item stays with that item, and whatever is left out is named."""

import gzip
import json

import pytest

from aquila.data.prepare import inputs
from aquila.data.prepare.answers import conversation
from aquila.data.prepare.bad import BadDocumentError
from aquila.data.prepare.blocks import _batch_rows, cut
from aquila.data.prepare.documents import ReaderOptions, document_of
from aquila.data.prepare.inputs import find_sources


def test_a_parquet_cell_that_is_no_text_is_one_bad_document() -> None:
    pa = pytest.importorskip("pyarrow")
    offsets = (0).to_bytes(4, "little") + (2).to_bytes(4, "little") + (4).to_bytes(4, "little")
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"ok\xff\xfe")]
    batch = pa.RecordBatch.from_arrays([pa.Array.from_buffers(pa.string(), 2, buffers)], ["text"])
    good, bad = _batch_rows(batch)
    assert document_of(1, good, ReaderOptions()).texts == ["ok"]
    with pytest.raises(BadDocumentError, match="binary data"):
        document_of(2, bad, ReaderOptions())


def test_a_text_that_a_parquet_file_repeats_is_in_memory_once(tmp_path, monkeypatch) -> None:
    """2,000 rows of 4 MiB in a file of a few hundred bytes."""
    pa = pytest.importorskip("pyarrow")
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * (4 << 20)]))
    path = tmp_path / "in.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(
        pa.table({"text": repeated}), path, compression="gzip", store_schema=False
    )
    assert path.stat().st_size < 20_000
    first = next(cut(find_sources([str(path)]), text_lines=False, columns=("text",)))
    assert len(first.items) == 1
    assert len(first.items[0][1]["text"]) == 4 << 20
    assert pa.default_memory_pool().max_memory() < 200 << 20


@pytest.mark.parametrize("sender", [["human"], {"a": 1}, None, 5, "x" * 10**6])
def test_a_role_of_any_type_is_a_bad_document(sender: object) -> None:
    with pytest.raises(BadDocumentError, match="turn 1 is from") as raised:
        conversation([{"from": sender, "value": "hi"}], "aquila")
    assert len(str(raised.value)) < 200


def test_what_is_left_out_is_named_and_what_is_meant_is_found(tmp_path, capsys) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / ".cache").mkdir()
    for name in ("A.JSONL", "b.ndjson", "notes.doc", "._A.JSONL", ".cache/old.txt"):
        (folder / name).write_text(json.dumps({"text": "a"}))
    (elsewhere / "c.Txt.GZ").touch()
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    for item in (str(folder), f"{folder}/"):
        found = [source.path.rpartition("/")[2] for source in find_sources([item])]
        assert found == ["A.JSONL", "b.ndjson", "c.Txt.GZ"]
    assert "1 file(s) of no known kind are left out: notes.doc" in (told := capsys.readouterr().err)
    assert "2 file(s) hidden by a dot are left out: ._A.JSONL, old.txt" in told


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz", "a.jsonl.zst"])
def test_a_compressed_input_that_unfolds_without_bound_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(inputs, "_FREE_BYTES", 1 << 20)
    data = b'["' + b"a" * (64 << 20)
    if name.endswith(".gz"):
        packed = gzip.compress(data)
    else:
        packed = pytest.importorskip("zstandard").compress(data)
    (tmp_path / name).write_bytes(packed)
    (source,) = inputs.find_sources([str(tmp_path / name)])

    def read_all():
        with inputs.ByteStream(source) as stream:
            while stream.read(1 << 20):
                pass

    with pytest.raises(inputs.DamagedInputError, match="unfolds to more than 500 times its size"):
        read_all()


def test_text_that_shrinks_well_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_FREE_BYTES", 1 << 16)
    line = b'{"text": "one and the same line, again and again"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 20_000))
    (source,) = inputs.find_sources([str(tmp_path / "a.jsonl.gz")])
    with inputs.ByteStream(source) as stream:
        assert sum(iter(lambda: len(stream.read(1 << 16)), 0)) == 20_000 * len(line)
