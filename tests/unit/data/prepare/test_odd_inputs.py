"""One bad item stays with that item, and whatever is left out is named."""

import json

import pytest

from aquila.data.prepare.answers import conversation
from aquila.data.prepare.bad import BadDocumentError
from aquila.data.prepare.blocks import _batch_rows
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


@pytest.mark.parametrize("sender", [["human"], {"a": 1}, None, 5, "x" * 10**6])
def test_a_role_of_any_type_is_a_bad_document(sender: object) -> None:
    with pytest.raises(BadDocumentError, match="turn 1 is from") as raised:
        conversation([{"from": sender, "value": "hi"}], "aquila")
    assert len(str(raised.value)) < 200


def test_what_is_left_out_is_named_and_what_is_meant_is_found(tmp_path, capsys) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for name in ("A.JSONL", "b.ndjson", "notes.doc"):
        (folder / name).write_text(json.dumps({"text": "a"}))
    (elsewhere / "c.Txt.GZ").touch()
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    found = [source.path.rpartition("/")[2] for source in find_sources([str(folder)])]
    assert found == ["A.JSONL", "b.ndjson", "c.Txt.GZ"]
    assert "1 file(s) of no known kind are left out: notes.doc" in capsys.readouterr().err
