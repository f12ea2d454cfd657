"""Every input form gives the same documents; the bytes do not depend on workers; bad lines are named."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila.core.errors import UserError
from aquila.data.indexfile import read_index, read_tokens
from aquila.data.prepare import blocks
from aquila.data.prepare.answers import AQUILA_SYSTEM, conversation
from aquila.data.prepare.inputs import find_sources
from aquila.data.prepare.pipeline import PrepareOptions, make_datasets
from aquila.tokenizer import load_tokenizer

TEXTS = [f"document {i}: " + "Monday 星期一 🙂\n" * (i % 7) + "end" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(root):
    return load_tokenizer(root / "checkpoints_in/aquila-tiny")


def make(tokenizer, inputs, prefix, **options):
    return make_datasets(PrepareOptions([str(i) for i in inputs], str(prefix), **options), tokenizer)


def documents(prefix):
    index = read_index(prefix)
    return np.split(read_tokens(prefix, index), np.cumsum(index.lengths)[:-1])


def texts_of(tokenizer, prefix):
    framed = documents(prefix)
    assert all(d[0] == tokenizer.bos_id and d[-1] == tokenizer.eos_id for d in framed)
    return [tokenizer.decode(d[1:-1].tolist(), skip_special=False) for d in framed]


def jsonl(texts):
    return "".join(json.dumps({"id": 1, "text": t}, ensure_ascii=False) + "\n" for t in texts).encode()


def zstd(data):
    return pytest.importorskip("zstandard").compress(data)


FORMS = {
    "d.jsonl": jsonl,
    "crlf.jsonl": lambda texts: jsonl(texts).replace(b"\n", b"\r\n"),
    "blank.jsonl": lambda texts: b"\xef\xbb\xbf" + jsonl(texts).replace(b"\n", b"\n\n  \n").rstrip(),
    "d.jsonl.gz": lambda texts: gzip.compress(jsonl(texts[:9])) + gzip.compress(jsonl(texts[9:])),
    "d.jsonl.zst": lambda texts: zstd(jsonl(texts[:9])) + zstd(jsonl(texts[9:])),
    "d.json": lambda texts: json.dumps([{"text": t} for t in texts], indent=2).encode(),
    "small.json": lambda texts: json.dumps([{"text": t} for t in texts], separators=(",", ":")).encode(),
    "stream.json": jsonl,
    "d.json.gz": lambda texts: gzip.compress(json.dumps([{"text": t} for t in texts]).encode()),
    "c.json": lambda texts: json.dumps([{"id": "x", "conversations": turns(t)} for t in texts]).encode(),
    "c.jsonl": lambda texts: "".join(json.dumps({"conversations": turns(t)}) + "\n" for t in texts).encode(),
}


def turns(text):
    return [{"from": f, "value": v} for f, v in zip(["human", "gpt"] * 9, text.split("\n"), strict=False)]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("block", [64, 700, 1 << 20])
def test_every_form_gives_the_documents(tokenizer, tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    (tmp_path / name).write_bytes(FORMS[name](TEXTS))
    outcome = make(tokenizer, [tmp_path / name], tmp_path / "out", workers=2)
    assert texts_of(tokenizer, tmp_path / "out_text_document") == TEXTS
    assert outcome.documents == len(TEXTS)
    assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name or "tmp" in p.name) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1), min_size=1
    ),
    st.integers(1, 200),
    st.sampled_from(["d.jsonl", "d.json", "small.json", "d.jsonl.gz"]),
)
def test_any_text_in_any_blocks(tokenizer, tmp_path_factory, texts, block, name):
    folder = tmp_path_factory.mktemp("any")
    (folder / name).write_bytes(FORMS[name](texts))
    before, blocks.BLOCK_BYTES = blocks.BLOCK_BYTES, block
    try:
        cut = list(blocks.cut(find_sources([str(folder / name)]), text_lines=False, columns=("text",)))
    finally:
        blocks.BLOCK_BYTES = before
    from aquila.data.prepare.documents import ReaderOptions, read_documents

    found = [f for b in cut for f in read_documents(b, ReaderOptions())[0]]
    assert [f.texts for f in found] == [[t] for t in texts]


def test_text_files(tokenizer, tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("two\nlines\n")
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (folder / "sub" / "c.txt").write_text("three")
    (folder / "README.md").write_text("not an input")
    make(tokenizer, [folder], tmp_path / "files")
    assert texts_of(tokenizer, tmp_path / "files_text_document") == ["one", "two\nlines\n", "three"]
    make(tokenizer, [folder / "sub", folder / "*.txt"], tmp_path / "lines", text_lines=True)
    assert texts_of(tokenizer, tmp_path / "lines_text_document") == ["three", "two", "lines"]


def test_parquet(tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"n": list(range(60)), "text": TEXTS}), tmp_path / "d.parquet")
    make(tokenizer, [tmp_path / "d.parquet"], tmp_path / "out")
    assert texts_of(tokenizer, tmp_path / "out_text_document") == TEXTS
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        make(tokenizer, [tmp_path / "bad.parquet"], tmp_path / "bad")


def test_several_keys_give_a_dataset_each(tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "one", "a": "two"}\n{"q": "three", "a": "four"}\n')
    make(tokenizer, [tmp_path / "d.jsonl"], tmp_path / "out", keys=("q", "a"))
    assert texts_of(tokenizer, tmp_path / "out_q_document") == ["one", "three"]
    assert texts_of(tokenizer, tmp_path / "out_a_document") == ["two", "four"]


def test_same_bytes_for_any_workers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    (tmp_path / "d.jsonl").write_bytes(jsonl(TEXTS * 5))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    written = []
    for workers in (1, 2, 5):
        prefix = tmp_path / f"w{workers}"
        make(tokenizer, [tmp_path / "d.jsonl", tmp_path / "e.jsonl.gz"], prefix, workers=workers)
        written.append(
            [(tmp_path / f"w{workers}_text_document{e}").read_bytes() for e in (".bin", ".idx", ".meta.json")]
        )
    assert written[0] == written[1] == written[2]


def test_conversation_templates():
    talk = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "?"},
    ]
    assert conversation(talk, "plain") == "Hi\nHello\n?"
    assert conversation(talk, "aquila") == f"{AQUILA_SYSTEM}###Human: Hi###Assistant: Hello###Human: ?"


def test_special_tokens_are_parsed_only_when_asked(tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a</s>b"}\n')
    make(tokenizer, [tmp_path / "d.jsonl"], tmp_path / "plain")
    assert documents(tmp_path / "plain_text_document")[0].tolist().count(tokenizer.eos_id) == 1
    make(tokenizer, [tmp_path / "d.jsonl"], tmp_path / "parsed", allow_special=True)
    assert documents(tmp_path / "parsed_text_document")[0].tolist().count(tokenizer.eos_id) == 2


BAD_LINES = {
    b'{"text": "x"': "not valid JSON",
    b'{"body": "x"}': "key 'text' is missing (the object has 'body')",
    b'{"text": 3}': "holds a number, not text",
    b'["text"]': "a JSON object is wanted, not a list",
    b'{"text": "\xff"}': "invalid UTF-8 at byte 11",
    b'{"text": ""}': "the document is empty",
    b'{"text": "a\\u0000"}': "NUL byte (character 2)",
    b'{"text": "a\x00"}': "not valid JSON",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b'{"conversations": []}': "must hold a list of turns",
    b'{"conversations": [{"from": "human"}]}': "turn 1 of the conversation",
    b"[" * 100_000: "nested too deep",
    b'{"text": 1' + b"0" * 5000 + b"}": "not valid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:24].decode("latin-1"))
@pytest.mark.parametrize("compressed", [False, True])
def test_bad_lines(tokenizer, tmp_path, monkeypatch, line, compressed):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 200)
    name = "d.jsonl.gz" if compressed else "d.jsonl"
    data = jsonl(TEXTS[:20]) + line + b"\n" + jsonl(TEXTS[20:])
    (tmp_path / name).write_bytes(gzip.compress(data) if compressed else data)
    with pytest.raises(UserError) as raised:
        make(tokenizer, [tmp_path / name], tmp_path / "out", workers=2)
    assert f"{name}, line 21: " in str(raised.value)
    assert BAD_LINES[line] in str(raised.value)
    assert not (tmp_path / "out_text_document.idx").exists()
    outcome = make(tokenizer, [tmp_path / name], tmp_path / "out", workers=2, on_error="skip")
    assert outcome.resumed_parts > 0
    assert (outcome.documents, outcome.rejected) == (60, 1)
    assert texts_of(tokenizer, tmp_path / "out_text_document") == TEXTS
    (reject,) = (tmp_path / "out_text_document.rejects.jsonl").read_text().splitlines()
    record = json.loads(reject)
    assert record["line"] == 21
    assert BAD_LINES[line] in record["reason"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"},\n {"text": "b"}\n', "line 3: the file ends within the array"),
        (b'[{"text": "a"},\n {"text" "b"}]', "line 2: not valid JSON"),
        (b'[{"text": "a"}]\n x', "line 2: something follows"),
        (b'[{"text": "a"},\n]', "line 2: a comma before the end"),
        (b'[\n{"text": "a"}, {"text": "\xff"}]', "line 2: not UTF-8"),
        (b'[{"text": "a"},\n{"text": 1}]', "line 2: 'text' holds a number"),
    ],
)
def test_broken_arrays(tokenizer, tmp_path, content, message):
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        make(tokenizer, [tmp_path / "d.json"], tmp_path / "out")
    if "not UTF-8" not in message:
        outcome = make(tokenizer, [tmp_path / "d.json"], tmp_path / "out", on_error="skip")
        assert outcome.rejected == 1
        assert texts_of(tokenizer, tmp_path / "out_text_document")[0] == "a"


@pytest.mark.parametrize(
    ("make_input", "message"),
    [
        (lambda f: (f / "e.jsonl").write_bytes(b""), "hold no document"),
        (lambda f: (f / "e.jsonl").write_bytes(b"\n \n"), "hold no document"),
        (lambda f: (f / "e.json").write_bytes(b"[]"), "hold no document"),
        (lambda f: (f / "e.txt").write_bytes(b""), "the document is empty"),
        (lambda f: (f / "e.txt").write_bytes(b"a\x00b"), "NUL byte"),
        (lambda f: (f / "notes.md").write_bytes(b"x"), "holds no file of a known kind"),
        (
            lambda f: (f / "e.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS))[:-40]),
            "cannot be decompressed",
        ),
        (lambda f: (f / "e.jsonl.zst").write_bytes(zstd(jsonl(TEXTS))[:-40]), "cannot be decompressed"),
        (lambda f: (f / "e.jsonl.gz").write_bytes(b"no gzip"), "cannot be decompressed"),
    ],
)
def test_inputs_without_documents(tokenizer, tmp_path, make_input, message):
    folder = tmp_path / "in"
    folder.mkdir()
    make_input(folder)
    with pytest.raises(UserError, match=message):
        make(tokenizer, [folder], tmp_path / "out")


def test_inputs_that_are_not_there(tokenizer, tmp_path):
    for item, message in (("none.jsonl", "does not exist"), ("*.jsonl", "matches no file")):
        with pytest.raises(UserError, match=message):
            make(tokenizer, [tmp_path / item], tmp_path / "out")
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    with pytest.raises(UserError, match="named twice"):
        make(tokenizer, [tmp_path / "a.jsonl", tmp_path], tmp_path / "out")


def test_an_input_that_changes_meanwhile(tokenizer, tmp_path, monkeypatch):
    from aquila.data.prepare import pipeline

    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS))
    append = pipeline._append

    def append_and_touch(*arguments):
        append(*arguments)
        path.write_bytes(jsonl(TEXTS[1:]))

    monkeypatch.setattr(pipeline, "_append", append_and_touch)
    with pytest.raises(UserError, match="changed while it was read"):
        make(tokenizer, [path], tmp_path / "out")
    assert not (tmp_path / "out_text_document.idx").exists()


def test_parts_of_another_plan_are_not_taken_over(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    path = tmp_path / "d.jsonl"
    path.write_bytes(jsonl(TEXTS) + b"broken\n")
    with pytest.raises(UserError):
        make(tokenizer, [path], tmp_path / "out")
    path.write_bytes(jsonl(TEXTS[::-1]))
    assert make(tokenizer, [path], tmp_path / "out").resumed_parts == 0
    assert texts_of(tokenizer, tmp_path / "out_text_document") == TEXTS[::-1]


def test_damaged_parts_are_made_again(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    path = tmp_path / "d.jsonl"
    path.write_bytes(jsonl(TEXTS) + b"broken\n")
    with pytest.raises(UserError):
        make(tokenizer, [path], tmp_path / "out", workers=2)
    part = tmp_path / "out_text_document.partial" / "0.bin"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    outcome = make(tokenizer, [path], tmp_path / "out", on_error="skip")
    assert 0 < outcome.resumed_parts < 30
    assert texts_of(tokenizer, tmp_path / "out_text_document") == TEXTS


def test_a_dead_worker_is_reported(tokenizer, tmp_path):
    import os

    from aquila.data.prepare.pool import WorkerDiedError, run_tasks

    with pytest.raises(WorkerDiedError, match="short of memory"):
        list(run_tasks(lambda task: os._exit(9), range(3), 2, ahead=4))


def test_results_come_in_order_and_not_too_far_ahead():
    import random
    import time

    from aquila.data.prepare.pool import run_tasks

    drawn = []

    def tasks():
        for i in range(40):
            drawn.append(i)
            yield i

    def work(i):
        time.sleep(random.Random(i).random() / 200)
        return i * i

    for expected, (task, result) in enumerate(run_tasks(work, tasks(), 3, ahead=6)):
        assert (task, result) == (expected, expected**2)
        assert drawn[-1] <= expected + 6
    assert drawn == list(range(40))
