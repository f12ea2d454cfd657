"""Evaluation: every token predicted once, in its own document, whatever the batches and the ranks."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aquila.core.errors import UserError
from aquila.evaluate import byte_table, evaluate, make_batches, make_windows, open_documents
from aquila.model import AquilaModel
from aquila.tokenizer import load_tokenizer
from tests.unit.generation.models import write_model_dir

TEXTS = ["one plus two is three.", "三加四等于七。", "🙂", "a longer text, " * 30]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, root):
    return write_model_dir(tmp_path_factory.mktemp("model"), root, max_seq_len=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(model_dir, data, split="100", part="train", limit=None, **changes):
    tokenizer = load_tokenizer(model_dir)
    values = {
        "seq_length": None,
        "batch_tokens": 100,
        "model_dir": model_dir,
        "data": data,
        "int8": False,
        **changes,
    }
    documents = open_documents(str(data), tokenizer, split, part, limit)
    model = AquilaModel.from_pretrained(model_dir)
    return evaluate(model, tokenizer, documents, SimpleNamespace(**values), 0, 1)


def by_hand(model_dir, texts, window):
    tokenizer, model = load_tokenizer(model_dir), AquilaModel.from_pretrained(model_dir)
    nats, count = 0.0, 0
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for start in range(0, len(ids) - 1, window):
            part = torch.tensor([ids[start : start + window + 1]])
            log = torch.log_softmax(model(part[:, :-1]).double(), -1)
            nats -= log.gather(-1, part[:, 1:, None]).sum().item()
            count += part.shape[1] - 1
    return nats, count


@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
def test_equals_the_sum_over_documents(model_dir, data, batch_tokens):
    report = run(model_dir, data, batch_tokens=batch_tokens)
    nats, count = by_hand(model_dir, TEXTS, 32)
    size = sum(len(text.encode()) for text in TEXTS)
    assert report.tokens == count
    assert report.bytes == size
    assert report.documents == len(TEXTS)
    assert report.loss == pytest.approx(nats / count, rel=1e-6)
    assert report.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert report.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_split_takes_the_trainings_share(model_dir, data):
    report = run(model_dir, data, split="75,25", part="valid")
    nats, count = by_hand(model_dir, TEXTS[3:], 32)
    assert report.tokens == count
    assert report.loss == pytest.approx(nats / count, rel=1e-6)
    assert run(model_dir, data, limit=2).documents == 2


def test_a_text_file_is_one_document(model_dir, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("first line\n\nsecond line, 两行\n", encoding="utf-8")
    report = run(model_dir, path)
    nats, count = by_hand(model_dir, [path.read_text(encoding="utf-8")], 32)
    assert (report.documents, report.bytes) == (1, len(path.read_bytes()))
    assert report.loss == pytest.approx(nats / count, rel=1e-6)


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 20), st.integers(1, 100))
def test_every_token_but_the_first_is_predicted_once(lengths, seq_length, batch_tokens):
    windows = make_windows(np.array(lengths, np.int64), seq_length)
    batches = make_batches(windows, batch_tokens)
    predicted = [(d, t) for b in batches for d, s, n in b.tolist() for t in range(s + 1, s + n + 1)]
    assert sorted(predicted) == [(d, t) for d, length in enumerate(lengths) for t in range(1, length)]
    assert all(len(batch) == 1 or len(batch) * batch[0, 2] <= batch_tokens for batch in batches)


def test_bytes_of_ids_add_up_to_the_text(root):
    tokenizer = load_tokenizer(root / "checkpoints_in" / "aquila-tiny")
    sizes = byte_table(tokenizer)
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert sizes[ids].sum() == len(text.encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no text"),
        ('{"text": 1}\n', "line 1"),
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("no\n", "line 1"),
    ],
)
def test_what_is_no_data_is_refused(model_dir, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        run(model_dir, path)
    with pytest.raises(UserError, match="neither"):
        run(model_dir, tmp_path / "missing")
    path.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="context 32"):
        run(model_dir, path, seq_length=64)
