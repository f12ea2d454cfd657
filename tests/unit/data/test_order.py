"""A change of the blend goes on from what is consumed of each corpus; other changes are refused."""

import json

import pytest

from aquila.core.errors import UserError
from aquila.data.indexed import open_corpora
from aquila.data.order import FILE, continue_order, open_order, record_order
from tests.unit.data.conftest import numbered, write_dataset

SEQ = 16


@pytest.fixture
def corpora(tmp_path):
    sizes = {"a": 60, "b": 40, "c": 50}
    return [str(write_dataset(tmp_path / n, numbered(s, seed=i))) for i, (n, s) in enumerate(sizes.items())]


def train(run_dir, data_prefix, start, stop, seq=SEQ, seed=1, split="100"):
    """What a run does from `start` to `stop` consumed samples: (corpus, sample of it) of each, and notes."""
    stream = open_corpora(data_prefix, split, seq, seed).train
    notes = continue_order(run_dir, stream, start)
    record_order(run_dir, stream)
    taken = [stream[k].provenance for k in range(start, stop)]
    assert [(p.corpus, p.index) for p in taken] == [stream.locate(k) for k in range(start, stop)]
    return [(p.corpus, p.index) for p in taken], notes


def assert_no_gap(taken):
    for name in {name for name, _ in taken}:
        indices = [index for other, index in taken if other == name]
        assert indices == list(range(len(indices))), name


def test_changed_weights_go_on_from_each_corpus_count(tmp_path, corpora):
    a, b, c = corpora
    first, notes = train(tmp_path, [3, a, 1, b], 0, 100)
    assert notes == []
    second, notes = train(tmp_path, [1, a, 3, b], 100, 200)
    assert "changes at sample 100" in notes[0]
    assert "goes on at its sample 75" in notes[1]
    assert "goes on at its sample 25" in notes[2]
    third, notes = train(tmp_path, [1, a, 1, c], 200, 300)
    assert "left out after 100 samples" in notes[3]
    assert "new, weight 0.5" in notes[2]
    fourth, notes = train(tmp_path, [1, a, 1, c], 300, 340)
    assert notes == []
    fifth, _ = train(tmp_path, [1, a, 1, b], 340, 400)
    everything = first + second + third + fourth + fifth
    assert_no_gap(everything)
    counts = [[name for name, _ in part].count(a) for part in (first, second, third)]
    assert all(abs(count - wanted) <= 1 for count, wanted in zip(counts, (75, 25, 50), strict=True))
    stream = open_order(tmp_path)
    assert [stream.locate(k) for k in range(400)] == everything


def test_resuming_before_a_change_takes_it_back(tmp_path, corpora):
    a, b, _ = corpora
    before, _ = train(tmp_path, [3, a, 1, b], 0, 100)
    train(tmp_path, [1, a, 3, b], 100, 150)
    again, notes = train(tmp_path, [1, a, 1, b], 60, 120)
    assert "changes at sample 60" in notes[0]
    assert_no_gap(before[:60] + again)


def test_resuming_before_a_change_with_its_weights_changes_there(tmp_path, corpora):
    a, b, _ = corpora
    before, _ = train(tmp_path, [3, a, 1, b], 0, 100)
    train(tmp_path, [1, a, 3, b], 100, 150)
    again, notes = train(tmp_path, [1, a, 3, b], 60, 140)
    assert "changes at sample 60" in notes[0]
    assert abs([name for name, _ in again].count(b) - 60) <= 1
    assert_no_gap(before[:60] + again)
    assert train(tmp_path, [1, a, 3, b], 90, 100)[1] == []


def test_resuming_without_change_is_the_undisturbed_order(tmp_path, corpora):
    a, b, _ = corpora
    whole, _ = train(tmp_path / "..", [3, a, 1, b], 0, 90)
    parts = [train(tmp_path, [3, a, 1, b], start, start + 30)[0] for start in (0, 30, 60)]
    assert [sample for part in parts for sample in part] == whole


@pytest.mark.parametrize(
    ("change", "key"), [({"seq": 8}, "seq_length"), ({"seed": 2}, "seed"), ({"split": "90,10"}, "split")]
)
def test_what_would_change_the_order_is_refused(tmp_path, corpora, change, key):
    train(tmp_path, [corpora[0]], 0, 10)
    with pytest.raises(UserError, match=f"begun with {key}"):
        train(tmp_path, [corpora[0]], 10, 20, **change)
    train(tmp_path, [corpora[0]], 0, 10, **change)


def test_a_dataset_with_other_content_is_refused(tmp_path, corpora):
    train(tmp_path, [corpora[0]], 0, 10)
    write_dataset(tmp_path / "a", numbered(70))
    with pytest.raises(UserError, match="order is another one"):
        train(tmp_path, [corpora[0]], 10, 20)


def test_no_run_and_damaged_file(tmp_path, corpora):
    with pytest.raises(UserError, match="a run folder"):
        open_order(tmp_path)
    train(tmp_path, [corpora[0]], 0, 10)
    content = json.loads((tmp_path / FILE).read_text()) | {"segments": [{"begin": 0}]}
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        open_order(tmp_path)
