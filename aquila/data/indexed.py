"""Corpora through Megatron-core: documents, samples, and an order that nothing but the data decides.

Sample k depends on corpus, seed and sequence length alone. Each epoch of a corpus has its own document
order, sample index and shuffle, drawn from (seed, epoch); epoch 0 is Megatron's own order of one epoch.
(Megatron's `GPTDataset` shuffles all epochs of a run together, so its order changes with their number.)
"""

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aquila.config import parse_blend
from aquila.config.run import parse_split
from aquila.core.errors import UserError
from aquila.data.blend import Blend, Segment
from aquila.data.indexfile import bin_path, read_index
from aquila.data.loss_mask import check_mask, mask_prefix
from aquila.data.meta import read_meta


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Megatron's import warns of Transformer Engine and Apex, which reading data does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _light_package() -> Iterator[None]:
    """Megatron's modules without what `megatron.core` itself imports, layers and torch's compiler: seconds.

    Whoever later asks the package for one of its own names gets the whole of it.
    """
    import megatron

    spec = PathFinder.find_spec("megatron.core", megatron.__path__)
    if spec is None or spec.loader is None or "megatron.core" in sys.modules:
        yield
        return
    package, loader = module_from_spec(spec), spec.loader

    def whole(name: str) -> Any:
        vars(package).pop("__getattr__", None)
        loader.exec_module(package)
        return getattr(package, name)

    sys.modules["megatron.core"] = megatron.core = package
    yield
    vars(package)["__getattr__"] = whole


with _quietly(), _light_package():
    # First: `megatron.core.utils` and this import one another, and only this order works.
    import megatron.core.parallel_state  # noqa: F401
    from megatron.core.datasets import helpers
    from megatron.core.datasets.indexed_dataset import IndexedDataset

_MADV_POPULATE_READ = 22

_KEPT_EPOCHS = 2
"""Order of this many epochs of a corpus stays in memory: at its end a batch may span two."""


class Sample(NamedTuple):
    """A training sample: tokens for `seq_length` inputs and the labels one further."""

    tokens: np.ndarray
    """int64 (seq_length + 1,)."""
    documents: np.ndarray
    """int64 (seq_length + 1,): which document of the sample each token belongs to, from 0 upwards."""
    provenance: "Provenance"
    mask: np.ndarray | None = None
    """uint8 (seq_length + 1,): 1 where a token counts as a label; None where all do."""


class Provenance(NamedTuple):
    """Where a sample comes from."""

    corpus: str
    epoch: int
    """Pass over this corpus."""
    sample: int
    """Sample of the corpus: epoch * samples per epoch + place in the epoch's order."""
    document_ids: tuple[int, ...]
    """Documents (sequences of the `.idx`) that the sample touches, in order."""
    first_offset: int
    """Token of the first document at which the sample begins."""


class EpochOrder(NamedTuple):
    """How one pass over a corpus is cut into samples."""

    documents: np.ndarray
    """int32 (documents,): the order in which documents follow one another."""
    starts: np.ndarray
    """int32 or int64 (samples + 1, 2): place in `documents` and token offset at which samples begin."""
    shuffle: np.ndarray
    """uint32 (samples,): the order of the samples."""


class _PositionedReader:
    """Reads tokens by `pread`, in place of Megatron's memory map.

    A random read through a map faults in page after page, each with read-ahead around it, and a larger
    corpus has fewer of them in memory; one positioned read fetches exactly what a sample needs.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, dtype: type, count: int, offset: int) -> np.ndarray:
        """`count` numbers of `dtype` from byte `offset` on."""
        size = int(count) * np.dtype(dtype).itemsize
        data = os.pread(self._file, size, int(offset))
        if len(data) != size:
            raise OSError(
                f"read {len(data)} of {size} bytes at {offset}: the .bin file was cut off meanwhile"
            )
        return np.frombuffer(data, dtype=dtype)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at the very end of a process contextlib may be gone
            os.close(self._file)
        except (AttributeError, OSError):
            pass


def _map_at_once(array: Any) -> None:
    """Enters a mapped file's pages into this process's page table in one call (Linux 5.14).

    Else each first touch costs a fault of its own, and a larger corpus has more places to touch first.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):
        array._mmap.madvise(_MADV_POPULATE_READ)


def open_dataset(prefix: str | Path) -> IndexedDataset:
    """Megatron's `IndexedDataset` over checked files. Raises `UserError` for damaged ones."""
    read_index(prefix)
    dataset = IndexedDataset(str(prefix), mmap=False)
    dataset.bin_reader = _PositionedReader(bin_path(prefix))
    _map_at_once(dataset.index.bin_buffer_mmap)
    return dataset


def open_mask(prefix: str | Path) -> IndexedDataset | None:
    """The loss mask of a dataset, None where there is none. Raises `UserError` for one that does not fit."""
    fits = check_mask(prefix, read_index(prefix), read_meta(prefix))
    return open_dataset(mask_prefix(prefix)) if fits else None


class Corpus:
    """A range of a dataset's documents as samples of `seq_length` tokens, epoch after epoch."""

    def __init__(
        self,
        dataset: IndexedDataset,
        prefix: str,
        documents: range,
        seq_length: int,
        seed: int,
        cache_dir: Path | None = None,
        mask: IndexedDataset | None = None,
    ) -> None:
        """`mask`: the loss mask, a dataset of the same documents."""
        self.prefix = prefix
        self.dataset = dataset
        self.mask = mask
        self._documents = documents
        self._seq_length = seq_length
        self._seed = seed
        self._cache_dir = cache_dir
        self._lengths = dataset.index.sequence_lengths
        self.tokens = int(self._lengths[documents.start : documents.stop].sum(dtype=np.int64))
        self.samples_per_epoch = max(0, self.tokens - 1) // seq_length
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` >= 0, in epoch `index // samples_per_epoch`."""
        epoch, place = divmod(index, self.samples_per_epoch)
        order = self.epoch_order(epoch)
        cut = int(order.shuffle[place])
        (first, offset), (last, end) = order.starts[cut].tolist(), order.starts[cut + 1].tolist()
        parts, ids, marks = [], [], []
        for at in range(first, last + 1):
            document = int(order.documents[at])
            start = offset if at == first else 0
            # Samples share one token: the last label of one is the first input of the next.
            stop = end + 1 if at == last else int(self._lengths[document])
            parts.append(self.dataset.get(document, offset=start, length=stop - start))
            if self.mask is not None:
                marks.append(self.mask.get(document, offset=start, length=stop - start))
            ids.append(document)
        tokens = np.concatenate(parts, dtype=np.int64)
        assert len(tokens) == self._seq_length + 1
        numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        found = Provenance(self.prefix, epoch, index, tuple(ids), offset)
        return Sample(tokens, numbers, found, np.concatenate(marks) if marks else None)

    def epoch_order(self, epoch: int) -> EpochOrder:
        """Order of one epoch: from memory, from the cache folder, or built."""
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        order = self._load(epoch)
        if order is None:
            order = self._build(epoch)
            self._store(epoch, order)
        self._epochs[epoch] = order
        if len(self._epochs) > _KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return order

    def _build(self, epoch: int) -> EpochOrder:
        # Frozen: every draw from `random` and their order, for runs in flight resume by them. Guarded by
        # tests/unit/data/. RandomState's streams are frozen by NumPy's compatibility promise (NEP 19).
        random = np.random.RandomState(self._seed if epoch == 0 else [self._seed, epoch])
        documents = np.arange(self._documents.start, self._documents.stop, dtype=np.int32)
        random.shuffle(documents)
        lengths = np.array(self._lengths)  # in memory: the builder visits them in random order
        starts = helpers.build_sample_idx(lengths, documents, self._seq_length, 1, self.tokens)
        kind = np.uint32 if self.samples_per_epoch < np.iinfo(np.uint32).max - 1 else np.int64
        shuffle = np.arange(self.samples_per_epoch, dtype=kind)
        random.shuffle(shuffle)
        return EpochOrder(documents, starts, shuffle)

    def _cache_folder(self, epoch: int) -> Path | None:
        if self._cache_dir is None:
            return None
        content = hashlib.blake2b(digest_size=12)
        lengths = self._lengths[self._documents.start : self._documents.stop]
        content.update(np.ascontiguousarray(lengths))
        key = ("order-1", self._documents.start, self._seq_length, self._seed, epoch)
        content.update(repr(key).encode())
        return self._cache_dir / content.hexdigest()

    def _load(self, epoch: int) -> EpochOrder | None:
        folder = self._cache_folder(epoch)
        if folder is None or not folder.is_dir():
            return None
        order = EpochOrder(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in EpochOrder._fields))
        for array in order:
            _map_at_once(array)
        return order

    def _store(self, epoch: int, order: EpochOrder) -> None:
        """Any number of processes may store at once: the first to rename its folder wins.

        A folder that cannot be written to only means that the order stays in memory.
        """
        folder = self._cache_folder(epoch)
        if folder is None:
            return
        unfinished = folder.with_name(f"{folder.name}.tmp-{os.uname().nodename}-{os.getpid()}")
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            for name, array in order._asdict().items():
                np.save(unfinished / f"{name}.npy", array)
            os.rename(unfinished, folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)

    def is_stored(self, epoch: int) -> bool:
        """Whether the cache folder holds the order of `epoch`."""
        folder = self._cache_folder(epoch)
        return folder is not None and folder.is_dir()


class SampleStream:
    """Samples 0, 1, 2, ... of one corpus or of a weighted blend, without end.

    Without weights, a corpus gives samples in proportion to its size. One epoch of a blend is as many
    samples as all its corpora hold together; each corpus goes through its own epochs at its own pace.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        weights: Sequence[float] | None = None,
        identity: dict[str, Any] | None = None,
        later: Sequence[Corpus] = (),
    ) -> None:
        """`later`: corpora that only other blends name, for `begin` and `plan`."""
        self.corpora = [*corpora, *later]
        self.identity = identity or {}
        """Split, sequence length and seed: with the corpora, what decides the order."""
        self.samples_per_epoch = sum(corpus.samples_per_epoch for corpus in self.corpora)
        self._places = {corpus.prefix: place for place, corpus in enumerate(self.corpora)}
        self._by_prefix = {corpus.prefix: corpus for corpus in self.corpora}
        self.weights = self.shares([corpus.prefix for corpus in corpora], weights)
        self._blends: dict[int, Blend] = {}
        self.segments = [Segment(0, self.weights)]

    @property
    def is_masked(self) -> bool:
        """Whether a corpus has a loss mask: samples then count unequal numbers of tokens."""
        return any(corpus.mask is not None for corpus in self.corpora)

    def place_of(self, prefix: str) -> int:
        """Place of a corpus in `corpora`."""
        return self._places[prefix]

    def __getitem__(self, k: int) -> Sample:
        """Sample `k` >= 0."""
        prefix, index = self.locate(k)
        return self._by_prefix[prefix][index]

    def locate(self, k: int) -> tuple[str, int]:
        """(path of the corpus, sample of that corpus) that sample `k` of the stream is."""
        segment = next(s for s in reversed(self.segments) if s.start <= k)
        place, index = self._blend(segment).locate(k - segment.start)
        prefix = list(segment.weights)[place]
        return prefix, segment.consumed.get(prefix, 0) + index

    def consumed(self, k: int) -> dict[str, int]:
        """Samples of each corpus among the first `k` of the stream."""
        segment = next(s for s in reversed(self.segments) if s.start <= k)
        counts = self._blend(segment).counts(k - segment.start)
        before = dict(segment.consumed)
        for prefix, count in zip(segment.weights, counts, strict=True):
            before[prefix] = before.get(prefix, 0) + count
        return before

    def _blend(self, segment: Segment) -> Blend:
        if segment.start not in self._blends:
            self._blends[segment.start] = Blend(list(segment.weights.values()), _build_blend)
        return self._blends[segment.start]

    def shares(self, prefixes: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
        """Normalized weight of each of these corpora, by size where no weights are given."""
        shares = list(weights or [self._by_prefix[prefix].samples_per_epoch for prefix in prefixes])
        return {prefix: share / sum(shares) for prefix, share in zip(prefixes, shares, strict=True)}

    def begin(self, weights: dict[str, float]) -> None:
        """Takes `weights` for those that the run has now, and from its first sample on."""
        self.weights = weights
        self.follow([Segment(0, weights)])

    def plan(self, start: int, weights: dict[str, float]) -> None:
        """From sample `start` on, after every segment so far, the blend has these weights."""
        self.segments.append(Segment(start, weights, self.consumed(start)))

    def follow(self, segments: Sequence[Segment]) -> None:
        """Takes over the history of a run; its last segment decides from its start on.

        A corpus that only earlier segments name can be counted, but not read.
        """
        self.segments = list(segments)
        self._blends = {}


def _build_blend(weights: np.ndarray, samples: int) -> np.ndarray:
    which, unused = np.empty(samples, np.int16), np.empty(samples, np.int64)
    helpers.build_blending_indices(which, unused, weights, len(weights), samples, False)
    return which


class Corpora(NamedTuple):
    """The splits of a run's data."""

    train: SampleStream
    valid: SampleStream | None
    """None where the validation split holds less than one sample."""


def open_corpora(
    data_prefix: list,
    split: str,
    seq_length: int,
    seed: int,
    cache_dir: str | Path | None = None,
    later: Sequence[str] = (),
) -> Corpora:
    """Opens the datasets of a run.

    `data_prefix`: paths, or weights and paths in turn. `split`: shares of documents for training and
    validation, in the order of the file. `cache_dir`: where the order of epochs is kept; without it,
    in `PREFIX.order/` where that folder exists (`data_tools.build_index` makes it), else in memory.
    `later`: datasets that the training stream takes up later; the validation stream does not have them.
    Raises `UserError` for missing or damaged files and for a training split below one sample.
    """
    prefixes, weights = parse_blend(list(data_prefix))
    if len(set(prefixes)) != len(prefixes):
        raise UserError(f"data_prefix names a dataset twice: {' '.join(prefixes)}; give it one larger weight")
    shares = parse_split(split)
    train, valid, valid_weights = [], [], []
    others = [prefix for prefix in later if prefix not in prefixes]
    for i, prefix in enumerate([*prefixes, *others]):
        dataset, mask = open_dataset(prefix), open_mask(prefix)
        count = len(dataset.index)
        first, second = (round(share * float(count)) for share in (shares[0], shares[0] + shares[1]))
        cache = Path(cache_dir) if cache_dir else Path(f"{prefix}.order")
        keep = cache if cache_dir or cache.is_dir() else None
        corpus = Corpus(dataset, prefix, range(0, first), seq_length, seed, keep, mask)
        if corpus.samples_per_epoch == 0:
            raise UserError(
                f"dataset {prefix}: its training split ({split}: {first} of {count} documents,"
                f" {corpus.tokens} tokens) holds no sample of {seq_length + 1}; use a shorter seq_length"
            )
        train.append(corpus)
        rest = Corpus(dataset, prefix, range(first, second), seq_length, seed, keep, mask)
        if rest.samples_per_epoch and i < len(prefixes):
            valid.append(rest)
            valid_weights.append(weights[i] if weights else 0.0)
    identity = {"split": split, "seq_length": seq_length, "seed": seed}
    held_out = SampleStream(valid, valid_weights if weights else None, identity) if valid else None
    first = len(prefixes)
    return Corpora(SampleStream(train[:first], weights, identity, train[first:]), held_out)
