"""Corpora as samples, in an order that nothing but the data decides.

Sample k depends on corpus, seed and sequence length alone. Each epoch of a corpus has its own document
order, sample index and shuffle, drawn from (seed, epoch); epoch 0 is Megatron's own order of one epoch.
(Megatron's `GPTDataset` shuffles all epochs of a run together, so its order changes with their number.)
"""

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aquila.config import parse_blend
from aquila.config.run import parse_split
from aquila.core.errors import UserError
from aquila.data.blend import Blend, Segment
from aquila.data.documents import Documents
from aquila.data.epoch_order import Cut, EpochOrder, Store, build, check_limits, in_memory
from aquila.data.indexfile import read_index
from aquila.data.loss_mask import check_mask, mask_prefix
from aquila.data.meta import read_meta

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


def open_mask(prefix: str | Path) -> Documents | None:
    """The loss mask of a dataset, None where there is none. Raises `UserError` for one that does not fit."""
    fits = check_mask(prefix, read_index(prefix), read_meta(prefix))
    return Documents(mask_prefix(prefix)) if fits else None


class Corpus:
    """A range of a dataset's documents as samples of `seq_length` tokens, epoch after epoch."""

    def __init__(
        self,
        source: Documents,
        documents: range,
        seq_length: int,
        seed: int,
        stores: Sequence[Store] = (),
        ids: int | None = None,
        mask: Documents | None = None,
    ) -> None:
        """stores: where the orders of its epochs may be kept, the best first. ids: all are below this.
        mask: the loss mask, a dataset of the same documents.
        """
        self.prefix = source.prefix
        self.source, self.mask = source, mask
        tokens = source.tokens_before(documents.stop) - source.tokens_before(documents.start)
        self._cut = Cut(source.index.lengths, documents, tokens, seq_length, seed)
        check_limits(self._cut, self.prefix)
        self._stores, self._ids = stores, ids
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()
        self._ahead: tuple[int, threading.Thread] | None = None
        self.notes: list[str] = []
        """What the user should know of where orders are kept."""

    @property
    def tokens(self) -> int:
        """Of its documents."""
        return self._cut.tokens

    @property
    def samples_per_epoch(self) -> int:
        return self._cut.samples

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` >= 0, in epoch `index // samples_per_epoch`. Raises `UserError` for damaged data."""
        epoch, place = divmod(index, self.samples_per_epoch)
        order = self.epoch_order(epoch)
        cut = int(order.shuffle[place])
        if cut >= self.samples_per_epoch:
            raise self._damaged(order, index)
        (first, offset), (last, end) = order.starts[cut].tolist(), order.starts[cut + 1].tolist()
        if not 0 <= first <= last < len(order.documents):
            raise self._damaged(order, index)
        parts, ids, marks = [], [], []
        for at in range(first, last + 1):
            document = int(order.documents[at])
            if document not in self._cut.documents:
                raise self._damaged(order, index)
            start = offset if at == first else 0
            # Samples share one token: the last label of one is the first input of the next.
            stop = end + 1 if at == last else None
            parts.append(self.source.read(document, start, stop))
            if self.mask is not None:
                marks.append(self.mask.read(document, start, stop))
            ids.append(document)
        tokens = np.concatenate(parts, dtype=np.int64)
        if len(tokens) != self._cut.seq_length + 1:
            raise self._damaged(order, index)
        numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        if self._ids is not None and not 0 <= tokens.min() <= tokens.max() < self._ids:
            wrong = int(np.flatnonzero((tokens < 0) | (tokens >= self._ids))[0])
            raise UserError(
                f"{self.prefix}.bin: document {ids[numbers[wrong]]:,} holds id {tokens[wrong]}, and the "
                f"model's vocabulary has {self._ids}: the file is damaged or was replaced"
            )
        found = Provenance(self.prefix, epoch, index, tuple(ids), offset)
        return Sample(tokens, numbers, found, np.concatenate(marks) if marks else None)

    def _damaged(self, order: EpochOrder, index: int) -> UserError:
        what = f"sample {index:,} of {self.prefix} is no {self._cut.seq_length + 1} tokens in a row"
        if (file := getattr(order.shuffle, "filename", None)) is None:
            return UserError(f"{self.source.index_file}: {what}: it was replaced; restore it, start again")
        return UserError(
            f"{Path(file).parent}: {what}: this stored order is damaged; remove the folder, and it is built "
            "again"
        )

    def epoch_order(self, epoch: int) -> EpochOrder:
        """Order of one epoch: from memory, stored, or built (and stored where that is possible)."""
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        order = self._stored(epoch)
        self._epochs[epoch] = order
        if len(self._epochs) > _KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return order

    def _stored(self, epoch: int) -> EpochOrder:
        if self._ahead is not None and self._ahead[0] == epoch:
            self._ahead[1].join()
        for store in self._stores:
            if (order := store.get(self._cut, epoch, self.source.index_file)) is not None:
                return order
            self._note(f"the order of its samples is not kept in {store.reason}")
        if self._stores:
            self._note("each rank builds the order of its samples by itself, in its own memory")
        return build(self._cut, epoch, in_memory)

    def _note(self, text: str) -> None:
        if (line := f"dataset {self.prefix}: {text}") not in self.notes:
            self.notes.append(line)

    def prepare_next(self, index: int) -> None:
        """Once half of an epoch is read, lets a thread store the order of the next one."""
        epoch, place = divmod(index, self.samples_per_epoch)
        begun = self._ahead is not None and self._ahead[0] == epoch + 1
        if 2 * place < self.samples_per_epoch or begun or not self._stores or epoch + 1 in self._epochs:
            return
        thread = threading.Thread(target=self._prepare, args=(epoch + 1,), name="next epoch", daemon=True)
        thread.start()
        self._ahead = (epoch + 1, thread)

    def _prepare(self, epoch: int) -> None:
        with contextlib.suppress(AttributeError, OSError):  # what computes goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        with contextlib.suppress(UserError):  # comes again, to be seen, when the epoch begins
            for store in self._stores:
                if store.get(self._cut, epoch, self.source.index_file) is not None:
                    return

    def is_stored(self, epoch: int) -> bool:
        """Whether a store holds the order of `epoch`."""
        paths = (store.path(self._cut, epoch, self.source.index_file) for store in self._stores)
        return any(path.is_dir() for path in paths)


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

    def open_orders(self, k: int) -> list[str]:
        """Opens, or builds, the orders in which the corpora are read from sample `k` on; returns `notes`."""
        for prefix, given in self.consumed(k).items():
            if prefix in self.segments[-1].weights:
                corpus = self._by_prefix[prefix]
                corpus.epoch_order(given // corpus.samples_per_epoch)
        return self.notes

    def prepare_next(self, k: int) -> None:
        """Lets the order of the next epoch of the corpus of sample `k` be stored ahead of its beginning."""
        prefix, index = self.locate(k)
        self._by_prefix[prefix].prepare_next(index)

    @property
    def notes(self) -> list[str]:
        """What the user should know of where the orders read so far are kept."""
        return [note for corpus in self.corpora for note in corpus.notes]

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
            self._blends[segment.start] = Blend(list(segment.weights.values()))
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


def default_stores(prefix: str) -> list[Store]:
    """Beside the dataset; else in the user's cache folder, by the dataset's whole path."""
    name = hashlib.blake2b(os.path.realpath(prefix).encode(), digest_size=8).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [Store(Path(f"{prefix}.order")), Store(cache / "aquila" / "order" / name)]


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
    ids: int | None = None,
) -> Corpora:
    """Opens the datasets of a run.

    `data_prefix`: paths, or weights and paths in turn. `split`: shares of documents for training and
    validation, in the order of the file. `cache_dir`: where the order of epochs is kept; without it in
    `PREFIX.order/`, else in the user's cache folder, else in memory. `ids`: a sample with an id of this or
    above, or below 0, is refused.
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
        source, mask = Documents(prefix), open_mask(prefix)
        count = len(source)
        first, second = (round(share * float(count)) for share in (shares[0], shares[0] + shares[1]))
        stores = [Store(Path(cache_dir))] if cache_dir else default_stores(prefix)
        corpus = Corpus(source, range(0, first), seq_length, seed, stores, ids, mask)
        if corpus.samples_per_epoch == 0:
            raise UserError(
                f"dataset {prefix}: its training split ({split}: {first} of {count} documents,"
                f" {corpus.tokens} tokens) holds no sample of {seq_length + 1}; use a shorter seq_length"
            )
        train.append(corpus)
        rest = Corpus(source, range(first, second), seq_length, seed, stores, ids, mask)
        if rest.samples_per_epoch and i < len(prefixes):
            valid.append(rest)
            valid_weights.append(weights[i] if weights else 0.0)
    identity = {"split": split, "seq_length": seq_length, "seed": seed}
    held_out = SampleStream(valid, valid_weights if weights else None, identity) if valid else None
    first = len(prefixes)
    return Corpora(SampleStream(train[:first], weights, identity, train[first:]), held_out)
