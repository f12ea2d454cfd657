"""A change of the blend goes on from what is consumed of each corpus; other changes are refused."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila.core.errors import UserError
from aquila.data.indexed import open_corpora
from aquila.data.order import FILE, _read, _segments, continue_order, open_order, order_files, order_text
from tests.unit.data.conftest import numbered, write_dataset

SEQ = 16


@pytest.fixture
def corpora(tmp_path):
    sizes = {"a": 60, "b": 40, "c": 50}
    return [str(write_dataset(tmp_path / n, numbered(s, seed=i))) for i, (n, s) in enumerate(sizes.items())]


def train(run_dir, data_prefix, start, stop, seq=SEQ, seed=1, split="100"):
    """What a run does from `start` to `stop` consumed samples: (corpus, sample of it) of each, and notes."""
    stream = open_corpora(data_prefix, split, seq, seed).train
    notes = continue_order(order_files(run_dir, None), stream, start)
    (run_dir / FILE).write_text(order_text(stream), encoding="utf-8")
    taken = [stream[k].provenance for k in range(start, stop)]
    assert [(p.corpus, p.sample) for p in taken] == [stream.locate(k) for k in range(start, stop)]
    return [(p.corpus, p.sample) for p in taken], notes


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


DAMAGE = ["", "{", "[]", "null", '{"segments": []}', "\udcff", '{"split": "100"', "[" * 100000, "1" * 5000]


@pytest.mark.parametrize("content", DAMAGE)
def test_a_torn_record_bars_no_resume(tmp_path, corpora, content):
    train(tmp_path, [corpora[0]], 0, 10)
    (tmp_path / FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    taken, notes = train(tmp_path, [corpora[0]], 10, 20)
    assert len(notes) == 2
    assert "is not used" in notes[0]
    assert "10 consumed samples" in notes[1]
    assert [index for _, index in taken] == list(range(10, 20))
    assert train(tmp_path, [corpora[0]], 20, 30)[1] == []  # it is whole again


def test_a_checkpoint_s_own_record_counts(tmp_path, corpora):
    """Also in another run's folder; then that of the run that wrote it; and only then this run's."""
    a, b, _ = corpora
    first, other, copy = tmp_path / "first", tmp_path / "other", tmp_path / "copy"
    checkpoint = first / "checkpoints" / "step-00000010"
    for folder in (checkpoint, other, copy):
        folder.mkdir(parents=True)
    train(first, [3, a, 1, b], 0, 100)
    for place in (checkpoint, copy):
        (place / FILE).write_bytes((first / FILE).read_bytes())
    (copy / FILE).write_text("")
    for files in (order_files(other, checkpoint), order_files(copy, checkpoint)):
        stream = open_corpora([1, a, 1, b], "100", SEQ, 1).train
        assert "changes at sample 100" in continue_order(files, stream, 100)[0]
        with pytest.raises(UserError, match="begun with seed"):
            continue_order(files, open_corpora([1, a, 1, b], "100", SEQ, 7).train, 100)
    (checkpoint / FILE).unlink()
    assert "changes at" in continue_order(order_files(other, checkpoint), stream, 100)[0]


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(st.none() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x, max_size=3)),
    st.data(),
)
def test_any_value_anywhere_is_damage_or_fine(tmp_path_factory, value, data):
    """A value of any type in the place of any other: a message, never anything else."""
    path = tmp_path_factory.mktemp("order") / FILE
    segment = {"start": 0, "weights": {"a": 1.0}, "consumed": {}}
    whole = {"split": "1", "seq_length": 8, "seed": 1, "samples_per_epoch": {"a": 3}, "segments": [segment]}
    place = data.draw(st.sampled_from([whole, segment]))
    place[data.draw(st.sampled_from(sorted(place)))] = value
    path.write_text(json.dumps(whole))
    with contextlib.suppress(UserError):
        _segments(path, _read(path))
