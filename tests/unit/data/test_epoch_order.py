"""The order of an epoch on disk: the same for every builder, whole or not at all, built once a node."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from aquila.backend.cpu_kernels import data_order, native
from aquila.core.errors import UserError
from aquila.data import epoch_order
from aquila.data.blend import Blend
from aquila.data.documents import Documents
from aquila.data.epoch_order import Cut, Store, build, check_limits, in_memory
from aquila.data.indexed import Corpus, default_stores, open_corpora
from tests.unit.data.conftest import numbered, write_dataset

SEQ = 16


def cut_of(lengths, seq=SEQ, seed=3):
    lengths = np.asarray(lengths, np.int32)
    return Cut(lengths, range(len(lengths)), int(lengths.sum(dtype=np.int64)), seq, seed)


def same(a, b):
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 63, 64, 65, 1000, 70_000])
@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_shuffle_is_numpys_and_leaves_the_same_state(count, dtype):
    ours, theirs = (np.random.RandomState([5, 7]) for _ in range(2))
    for _ in range(2):
        a, b = np.arange(count, dtype=dtype), np.arange(count, dtype=dtype)
        data_order.shuffle(a, ours)
        theirs.shuffle(b)
        assert np.array_equal(a, b)
    assert ours.randint(1 << 30) == theirs.randint(1 << 30)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "weights", [[1, 1], [3, 1, 2], [0.1, 0.2, 0.3, 0.4], list(np.arange(1, 41.0) ** 1.3)]
)
def test_blend_is_megatrons_from_any_place(monkeypatch, weights, compiled):
    helpers = pytest.importorskip("megatron.core.datasets.helpers")
    if not compiled:
        monkeypatch.setattr(data_order, "_library", lambda: None)
    weights, size = np.asarray(weights, np.float64), 50_000
    weights /= weights.sum()
    which, unused = np.empty(size, np.int16), np.empty(size, np.int64)
    helpers.build_blending_indices(which, unused, weights, len(weights), size, False)
    counts = np.zeros(len(weights), np.int64)
    parts = [data_order.blend(weights, counts, first, 12_500) for first in range(0, size, 12_500)]
    assert np.array_equal(np.concatenate(parts), which)
    assert counts.tolist() == np.bincount(which, minlength=len(weights)).tolist()
    far, near = Blend(weights), Blend(weights)
    places = [size - 1, 3, 20_000, 20_001, 16_384, 16_383]
    expected = [(int(which[k]), int((which[:k] == which[k]).sum())) for k in places]
    assert [far.locate(k) for k in places] == expected
    assert sorted(near.locate(k) for k in reversed(places)) == sorted(expected)
    assert far.counts(20_001) == np.bincount(which[:20_001], minlength=len(weights)).tolist()


@pytest.mark.parametrize("block", [1, 7, 1 << 20, None])
def test_starts_are_megatrons(monkeypatch, block):
    helpers = pytest.importorskip("megatron.core.datasets.helpers")
    if block is not None:  # without compiled loops
        monkeypatch.setattr(epoch_order, "_BLOCK", block)
        monkeypatch.setattr(data_order, "_library", lambda: None)
    lengths = np.random.RandomState(1).randint(0, 60, 300).astype(np.int32)
    cut = cut_of(lengths)
    order = build(cut, 2, in_memory)
    starts = helpers.build_sample_idx(lengths, order.documents, SEQ, 1, cut.tokens)
    assert np.array_equal(order.starts, starts)
    assert sorted(order.shuffle.tolist()) == list(range(cut.samples))


def test_a_damaged_or_missing_order_is_built_anew(tmp_path, make_dataset):
    prefix = make_dataset(numbered(300))
    expected = build(cut_of(Documents(prefix).index.lengths), 0, in_memory)
    store, cut = Store(tmp_path / "o"), cut_of(Documents(prefix).index.lengths)
    index_file = Documents(prefix).index_file
    assert same(store.get(cut, 0, index_file), expected)
    path = store.path(cut, 0, index_file)
    for name in ("starts.npy", "documents.npy"):
        file = path / name
        file.write_bytes(file.read_bytes()[:100])
        assert same(store.get(cut, 0, index_file), expected)
    (path / "shuffle.npy").unlink()
    assert same(store.get(cut, 0, index_file), expected)


def test_a_changed_index_has_another_order(tmp_path, make_dataset):
    first = make_dataset(numbered(100), "a")
    store, source = Store(tmp_path / "o"), Documents(first)
    before = store.path(cut_of(source.index.lengths), 0, source.index_file)
    store.get(cut_of(source.index.lengths), 0, source.index_file)
    again = Documents(write_dataset(first, numbered(100, seed=9)))
    assert store.path(cut_of(again.index.lengths), 0, again.index_file) != before


BUILD = """
import sys, time
from aquila.data import epoch_order
from aquila.data.indexed import open_corpora
if sys.argv[3] == "slow":
    fill = epoch_order._fill_starts
    epoch_order._fill_starts = lambda *given: (print("building", flush=True), time.sleep(60), fill(*given))
stream = open_corpora([sys.argv[1]], "100", 16, 1, sys.argv[2]).train
print(*stream[5].tokens.tolist())
"""


def test_a_killed_builder_leaves_nothing_in_the_way(tmp_path, make_dataset, root):
    prefix, folder = str(make_dataset(numbered(300))), tmp_path / "order"
    command = [sys.executable, "-c", BUILD, prefix, str(folder)]
    first = subprocess.Popen([*command, "slow"], cwd=root, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "building\n"
    second = subprocess.Popen([*command, "fast"], cwd=root, stdout=subprocess.PIPE, text=True)
    time.sleep(0.2)  # it waits for the first, or has not begun; either way it must end
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    expected = open_corpora([prefix], "100", 16, 1, tmp_path / "other").train[5].tokens.tolist()
    assert out.split() == [str(token) for token in expected]
    assert not [path.name for path in folder.iterdir() if "tmp" in path.name or "lock" in path.name]


def test_without_a_folder_that_can_be_written_ranks_go_on_and_say_so(tmp_path, make_dataset, monkeypatch):
    prefix = str(make_dataset(numbered(100)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside, cache = default_stores(prefix)
    beside.folder.write_text("a file in the way")
    stream = open_corpora([prefix], "100", SEQ, 1).train
    expected = stream[3].tokens.tolist()
    assert any(cache.folder.iterdir())
    assert "not kept in" in stream.notes[0]
    assert str(beside.folder) in stream.notes[0]
    cache.folder.parent.rename(tmp_path / "gone")
    cache.folder.parent.write_text("another")
    stream = open_corpora([prefix], "100", SEQ, 1).train
    assert stream[3].tokens.tolist() == expected
    assert "in its own memory" in stream.notes[-1]


def test_a_full_disk_is_noticed_before_anything_is_written_to_a_map(tmp_path, make_dataset, monkeypatch):
    source = Documents(make_dataset(numbered(100)))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = Store(tmp_path / "o")
    assert store.get(cut_of(source.index.lengths), 0, source.index_file) is None
    assert "No space left" in store.reason
    assert not [path for path in store.folder.iterdir() if "tmp" in path.name]


def test_the_next_epochs_order_is_there_before_the_epoch_ends(tmp_path, make_dataset):
    source = Documents(make_dataset(numbered(100)))
    corpus = Corpus(source, range(len(source)), SEQ, 1, [Store(tmp_path / "o")])
    corpus.epoch_order(0)
    corpus.prepare_next(0)
    assert corpus._ahead is None
    corpus.prepare_next(corpus.samples_per_epoch // 2 + 1)
    corpus._ahead[1].join()
    assert corpus.is_stored(1)
    assert not corpus.is_stored(2)
    plain = Corpus(source, range(len(source)), SEQ, 1)
    n = corpus.samples_per_epoch
    for k in range(n, 2 * n):
        assert corpus[k].tokens.tolist() == plain[k].tokens.tolist()


def test_what_cannot_be_numbered_is_refused_with_the_number():
    nothing = np.empty(0, np.int32)
    with pytest.raises(UserError, match="2,147,483,648 documents are more than the 2,147,483,647"):
        check_limits(Cut(nothing, range(2**31), 10, 1, 1), "d")
    with pytest.raises(UserError, match="samples of 2 tokens are more than the"):
        check_limits(Cut(nothing, range(10), 2**34, 2, 1), "d")
    check_limits(Cut(nothing, range(2**31 - 1), 2**34, 2048, 1), "d")


@pytest.mark.parametrize("compiled", [True, False])
def test_a_negative_length_is_a_message(monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(data_order, "_library", lambda: None)
    with pytest.raises(UserError, match="below 0"):
        build(cut_of([5, -3, 40]), 0, in_memory)
    lengths = np.asarray([5, 30, 40], np.int32)
    with pytest.raises(UserError, match=r"announces 60 tokens and holds 75"):
        build(Cut(lengths, range(3), 60, SEQ, 1), 0, in_memory)


def test_compiled_and_plain_orders_are_one(monkeypatch):
    if not data_order.available():
        pytest.skip("no C++ compiler on this machine")
    cut = cut_of(np.random.RandomState(2).randint(1, 90, 5000))
    compiled = build(cut, 1, in_memory)
    monkeypatch.setattr(data_order, "_library", lambda: None)
    assert same(compiled, build(cut, 1, in_memory))
    assert native.level() != "none"
