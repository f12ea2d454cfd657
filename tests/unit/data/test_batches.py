"""Labels are shifted once, masks are nobody else's, and the order survives any cutting and resuming."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila.data.batches import Batches, make_batch
from aquila.data.indexed import open_corpora
from tests.unit.data.conftest import numbered, write_dataset

SEQ = 16


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    a = write_dataset(folder / "a", numbered(40))
    b = write_dataset(folder / "b", [[t + 10_000 for t in d] for d in numbered(25, seed=1)])
    return open_corpora([2, str(a), 1, str(b)], "100", SEQ, 7).train


def run(stream, samples, world_size, micro_batch, resumes=()):
    """First inputs of all samples of a run in their order, restarted at each of `resumes`."""
    order, consumed = [], 0
    for stop in [*sorted(resumes), samples]:
        ranks = [Batches(stream, consumed, r, world_size, micro_batch) for r in range(world_size)]
        while consumed < stop:
            order += [row for batches in ranks for row in next(batches).tokens.tolist()]
            consumed += world_size * micro_batch
        for batches in ranks:
            batches.close()
    return order


def test_same_samples_for_any_world_and_micro_batch(stream):
    """Three epochs of one corpus and more, whole tokens compared, world sizes 1 to 4."""
    samples = 48 * (3 * stream.samples_per_epoch // 48 + 1)
    expected = [stream[k].tokens[:-1].tolist() for k in range(samples)]
    for world_size in (1, 2, 3, 4):
        for micro_batch in (1, 2, 4):
            assert run(stream, samples, world_size, micro_batch) == expected


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=4), st.sampled_from([(1, 4), (2, 2), (3, 4), (4, 1)]))
def test_same_samples_across_resumes(stream, steps, shape):
    world_size, micro_batch = shape
    batch = world_size * micro_batch
    resumes = [batch * step for step in steps]
    samples = batch * 13
    assert run(stream, samples, world_size, micro_batch, resumes) == [
        stream[k].tokens[:-1].tolist() for k in range(samples)
    ]


def test_labels_are_the_next_tokens(stream):
    batch = make_batch(stream, range(5, 8))
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    for row, k in enumerate(range(5, 8)):
        assert batch.tokens[row].tolist() == stream[k].tokens[:-1].tolist()
        assert batch.labels[row].tolist() == stream[k].tokens[1:].tolist()
    assert batch.documents is None
    assert batch.first_sample == 5


def test_no_token_is_masked_for_its_id_and_masks_are_never_shared(tmp_path):
    """Megatron's `GPTDataset` caches the first loss mask, then masks that very tensor where a label is the
    pad id: with pad 0 and text that holds id 0, every later sample has the first one's holes."""
    prefix = write_dataset(tmp_path / "zeros", [[0, 1, 2, 0, 3] * 10] * 10)
    zeros = open_corpora([str(prefix)], "100", SEQ, 1).train
    first = make_batch(zeros, range(2))
    assert first.loss_mask.sum() == first.loss_mask.numel()
    first.loss_mask.zero_()
    first.tokens.zero_()
    assert make_batch(zeros, range(2)).loss_mask.sum() == first.loss_mask.numel()
    assert make_batch(zeros, range(2)).tokens.sum() > 0


def test_megatrons_trap_is_real(tmp_path):
    """What the test above guards against, seen in Megatron itself: a pad id of 0 masks real tokens."""
    from tests.unit.data.test_indexed import megatron_dataset

    prefix = write_dataset(tmp_path / "zeros", [[0, 1, 2, 0, 3] * 10] * 10)
    assert megatron_dataset(prefix, tmp_path, seed=1, pad=0)[0]["loss_mask"].min() == 0
    assert megatron_dataset(prefix, tmp_path, seed=1, pad=-1)[0]["loss_mask"].min() == 1


def test_document_mask(stream):
    batch = make_batch(stream, range(20), document_mask=True)
    assert batch.documents.shape == batch.tokens.shape
    assert (batch.documents[:, 0] == 0).all()
    steps = batch.documents.diff(dim=1)
    assert set(steps.unique().tolist()) <= set(range(5))
    for row, k in enumerate(range(20)):
        numbers = stream[k].documents
        crosses = numbers[1:] != numbers[:-1]
        assert (batch.loss_mask[row].numpy() == ~crosses).all()
        assert np.array_equal(batch.documents[row].numpy(), numbers[:-1])


def test_an_error_of_the_reading_thread_comes_out(stream):
    class Broken:
        def __getitem__(self, k):
            if k < 2:
                return stream[k]
            raise OSError("disk gone")

        place_of = stream.place_of
        prepare_next = stream.prepare_next

    batches = Batches(Broken(), 0, 0, 1, 2)
    next(batches)
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_close_ends_the_thread(stream):
    batches = Batches(stream, 0, 0, 1, 1)
    batches.close()
    batches.close()
    assert not batches._thread.is_alive()
