"""Sample k depends on corpus, seed and sequence length alone; every token of an epoch comes exactly once."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila.core.errors import UserError
from aquila.data.documents import Documents
from aquila.data.epoch_order import Store
from aquila.data.indexed import Corpus, open_corpora
from tests.unit.data.conftest import numbered, write_dataset

SEQ = 16


def corpus_of(prefix, seq=SEQ, seed=1, cache=None):
    source = Documents(prefix)
    return Corpus(source, range(len(source)), seq, seed, [Store(cache)] if cache else [])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 50), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_each_epoch_holds_every_token_once(tmp_path_factory, count, longest, seq, seed):
    documents = numbered(count, longest, seed % 1000)
    prefix = write_dataset(tmp_path_factory.mktemp("corpus") / "c", documents)
    corpus = corpus_of(prefix, seq, seed)
    total = sum(map(len, documents))
    assert corpus.samples_per_epoch == max(0, total - 1) // seq
    for epoch in range(3 if corpus.samples_per_epoch else 0):
        first = epoch * corpus.samples_per_epoch
        samples = [corpus[first + i] for i in range(corpus.samples_per_epoch)]
        inputs = np.concatenate([s.tokens[:-1] for s in samples])
        assert len(set(inputs.tolist())) == len(inputs)  # no input twice
        assert total - 1 - len(inputs) < seq  # less than a sample is left over
        for sample in samples:
            assert_documents(sample, documents)


def assert_documents(sample, documents):
    """Tokens are those of the documents named, and `documents` changes exactly at their borders."""
    start = sample.provenance.first_offset
    expected = [t for d in sample.provenance.document_ids for t in documents[d]][start:]
    assert sample.tokens.tolist() == expected[: len(sample.tokens)]
    numbers = [i for i, d in enumerate(sample.provenance.document_ids) for _ in documents[d]][start:]
    assert sample.documents.tolist() == numbers[: len(sample.tokens)]


def test_first_epoch_is_megatrons_own(make_dataset, tmp_path):
    """Against `GPTDataset`, with a pad id that no token has (see the next test)."""
    prefix = make_dataset(numbered(300))
    ours, theirs = corpus_of(prefix, seed=1234), megatron_dataset(prefix, tmp_path, seed=1234, pad=-1)
    assert len(theirs) == ours.samples_per_epoch > 50
    for k in range(len(theirs)):
        assert theirs[k]["tokens"].tolist() == ours[k].tokens[:-1].tolist()
        assert theirs[k]["labels"].tolist() == ours[k].tokens[1:].tolist()


def megatron_dataset(prefix, tmp_path, seed, pad):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Ids:
        unique_identifiers, vocab_size, eod = {"class": "Ids"}, 1 << 20, 1 << 19

    Ids.pad = pad
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=SEQ,
        split="100",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=Ids(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = IndexedDataset(str(prefix))
    indices = np.arange(len(dataset), dtype=np.int32)
    return GPTDataset(dataset, str(prefix), indices, None, Split.train, config)


def test_order_depends_on_seed_epoch_and_length(make_dataset):
    prefix = make_dataset(numbered(100))
    first = corpus_of(prefix)
    n = first.samples_per_epoch
    order = [first[k].tokens.tolist() for k in range(2 * n)]
    assert order[:n] != order[n:]
    again = corpus_of(prefix)
    assert [again[k].tokens.tolist() for k in reversed(range(2 * n))] == order[::-1]
    assert [corpus_of(prefix, seed=2)[k].tokens.tolist() for k in range(n)] != order[:n]


def test_order_is_pinned(make_dataset):
    """A change of the order would break every run that resumes: it needs a new name, not a new meaning."""
    corpus = corpus_of(make_dataset(numbered(100)), seed=2023)
    n = corpus.samples_per_epoch
    picked = [corpus[k].tokens[0].item() for k in (0, 1, n, n + 1, 7 * n)]
    assert (n, picked) == PINNED


PINNED = (124, [178, 928, 1122, 643, 1232])


def test_split_and_blend(make_dataset):
    a, b = make_dataset(numbered(100), "a"), make_dataset(numbered(200, seed=3), "b")
    corpora = open_corpora([3, str(a), 1, str(b)], "80,20", SEQ, 5)
    stream = corpora.train
    names = [stream[k].provenance.corpus for k in range(400)]
    assert abs(names.count(str(a)) - 300) <= 1
    assert all(names[:k].count(str(b)) <= k / 4 + 1 for k in range(400))
    seen = {str(a): [], str(b): []}
    for k in range(400):
        seen[stream[k].provenance.corpus].append(stream[k].provenance.sample)
    assert all(indices == list(range(len(indices))) for indices in seen.values())
    assert stream.consumed(400) == {name: len(indices) for name, indices in seen.items()}
    train_documents = {d for k in range(200) for d in stream.corpora[0][k].provenance.document_ids}
    valid_documents = {d for k in range(50) for d in corpora.valid.corpora[0][k].provenance.document_ids}
    assert train_documents == set(range(80))
    assert valid_documents <= set(range(80, 100))


def test_without_weights_corpora_give_by_their_size(make_dataset):
    a, b = make_dataset(numbered(50), "a"), make_dataset(numbered(500, seed=3), "b")
    stream = open_corpora([str(a), str(b)], "100", SEQ, 5).train
    sizes = {c.prefix: c.samples_per_epoch for c in stream.corpora}
    consumed = stream.consumed(stream.samples_per_epoch)
    assert all(abs(consumed[name] - size) <= 1 for name, size in sizes.items())


def test_too_small_for_one_sample(make_dataset):
    prefix = make_dataset([[1, 2, 3]] * 10)
    with pytest.raises(UserError, match="holds no sample of 65"):
        open_corpora([str(prefix)], "90,10", 64, 1)
    assert open_corpora([str(prefix)], "90,10", 8, 1).valid is None


def test_cache_gives_the_same_order_and_is_used(make_dataset, tmp_path):
    prefix = make_dataset(numbered(200))
    plain, cached = corpus_of(prefix), corpus_of(prefix, cache=tmp_path / "order")
    expected = [plain[k].tokens.tolist() for k in range(plain.samples_per_epoch)]
    assert [cached[k].tokens.tolist() for k in range(len(expected))] == expected
    (folder,) = (path for path in (tmp_path / "order").iterdir() if path.is_dir())
    reopened = corpus_of(prefix, cache=tmp_path / "order")
    assert isinstance(reopened.epoch_order(0).shuffle, np.memmap)
    assert [reopened[k].tokens.tolist() for k in range(len(expected))] == expected
    other = corpus_of(prefix, seed=9, cache=tmp_path / "order")
    other.epoch_order(0)
    assert len([path for path in (tmp_path / "order").iterdir() if path.is_dir()]) == 2
    assert folder.is_dir()


def test_many_processes_may_build_the_cache_at_once(make_dataset, tmp_path, root):
    prefix = make_dataset(numbered(2000))
    code = (
        "import sys; from aquila.data.indexed import open_corpora;"
        f"s = open_corpora([{str(prefix)!r}], '100', 16, 1, {str(tmp_path / 'order')!r}).train;"
        "print(hash(tuple(s[0].tokens.tolist())))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    results = [run.communicate() for run in runs]
    assert len({out for out, _ in results}) == 1
    assert all(run.returncode == 0 and not err for run, (_, err) in zip(runs, results, strict=True)), results
    assert [p.name for p in (tmp_path / "order").iterdir() if "tmp" in p.name or "lock" in p.name] == []


def test_cut_off_bin_is_refused(make_dataset):
    prefix = make_dataset(numbered(20))
    file = prefix.with_suffix(".bin")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="cut off"):
        Documents(prefix)


def test_a_dataset_named_twice(make_dataset):
    prefix = str(make_dataset(numbered(20)))
    with pytest.raises(UserError, match="twice"):
        open_corpora([1, prefix, 2, prefix], "100", SEQ, 1)


def test_reading_data_loads_nothing_of_megatron():
    code = "import sys, aquila.data.indexed; assert not any('megatron' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
