"""The order of one epoch of a corpus: built once a node, stored whole or not at all, mapped by every rank.

A folder of orders holds one folder for each, named by a hash of what decides it, with `documents.npy`,
`starts.npy` and `shuffle.npy`. Building writes into mapped files, so that memory holds a block and the page
cache the rest, and takes a lock, so that one process builds and the others wait for it.

Frozen: the order itself and the names and dtypes of the files, for runs in flight resume by them.
Free: how it is built. Guarded by: tests/unit/data/test_indexed.py (Megatron's own order, and pinned numbers).
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from aquila.backend.cpu_kernels import data_order
from aquila.core.errors import UserError
from aquila.core.files import write_atomically
from aquila.core.lock import HeldError, take_lock

_BLOCK = 1 << 20
"""Documents, or samples, that are worked on at a time."""
_POLL = 0.05
_MOST_DOCUMENTS = 2**31 - 1
_MOST_SAMPLES = 2**32 - 2
_MADV_POPULATE_READ = 22
_POPULATED = 1 << 26
"""Bytes of a file up to which its pages are entered into the page table at once."""


class EpochOrder(NamedTuple):
    """How one pass over a corpus is cut into samples."""

    documents: np.ndarray
    """int32 (documents,): the order in which documents follow one another."""
    starts: np.ndarray
    """int32 (samples + 1, 2): place in `documents` and token offset at which samples begin."""
    shuffle: np.ndarray
    """uint32 (samples,): the order of the samples."""


class Cut(NamedTuple):
    """What decides the orders of a corpus: its documents' lengths, which of them, and how they are cut."""

    lengths: np.ndarray
    """int32: tokens of each document of the dataset."""
    documents: range
    tokens: int
    """Of those documents."""
    seq_length: int
    seed: int

    @property
    def samples(self) -> int:
        """Of an epoch."""
        return max(0, self.tokens - 1) // self.seq_length


def check_limits(cut: Cut, where: str) -> None:
    """Raises `UserError` for a corpus that has more documents or samples than the files can number."""
    if cut.documents.stop > _MOST_DOCUMENTS:
        raise UserError(
            f"dataset {where}: {cut.documents.stop:,} documents are more than the {_MOST_DOCUMENTS:,} that "
            "one dataset may have; make several and blend them"
        )
    if cut.samples > _MOST_SAMPLES:
        raise UserError(
            f"dataset {where}: {cut.samples:,} samples of {cut.seq_length} tokens are more than the "
            f"{_MOST_SAMPLES:,} that one dataset may have; make several and blend them"
        )


def build(cut: Cut, epoch: int, empty: Callable[[str, tuple[int, ...], Any], np.ndarray]) -> EpochOrder:
    """The order of `epoch` in arrays that `empty(name, shape, dtype)` gives.

    Raises `UserError` for lengths below 0.
    """
    # Frozen: every draw and their order. RandomState's streams are frozen by NumPy's promise (NEP 19).
    random = np.random.RandomState(cut.seed if epoch == 0 else [cut.seed, epoch])
    count, samples = len(cut.documents), cut.samples
    documents = empty("documents", (count,), np.int32)
    for first in range(0, count, _BLOCK):
        stop = min(first + _BLOCK, count)
        documents[first:stop] = cut.documents.start + np.arange(first, stop)
    data_order.shuffle(documents, random)
    starts = empty("starts", (samples + 1, 2), np.int32)
    _fill_starts(cut, documents, starts)
    shuffle = empty("shuffle", (samples,), np.uint32)
    for first in range(0, samples, _BLOCK):
        stop = min(first + _BLOCK, samples)
        shuffle[first:stop] = np.arange(first, stop, dtype=np.uint32)
    data_order.shuffle(shuffle, random)
    return EpochOrder(documents, starts, shuffle)


def _fill_starts(cut: Cut, documents: np.ndarray, starts: np.ndarray) -> None:
    """Sample i begins at token i * seq_length of the documents laid end to end in their order."""
    place = data_order.sample_starts(cut.lengths, documents, cut.seq_length, starts)
    if place is None:
        place = _fill_by_blocks(cut, documents, starts)
    if place < 0:
        raise UserError("a document's length in the .idx file is below 0: it is damaged, make it again")
    if place != cut.tokens:
        raise UserError(f"the .idx file announces {cut.tokens:,} tokens and holds {place:,}; make it again")


def _fill_by_blocks(cut: Cut, documents: np.ndarray, starts: np.ndarray) -> int:
    """As `data_order.sample_starts`, where nothing is compiled."""
    place, done = 0, 0
    for first in range(0, len(documents), _BLOCK):
        lengths = cut.lengths[documents[first : first + _BLOCK]]
        if int(lengths.min()) < 0:
            return -1
        ends = place + np.cumsum(lengths, dtype=np.int64)
        place = int(ends[-1])
        stop = min(len(starts), -(-place // cut.seq_length))
        at = np.arange(done, stop, dtype=np.int64) * cut.seq_length
        inside = np.searchsorted(ends, at, side="right")
        starts[done:stop, 0] = first + inside
        starts[done:stop, 1] = at - (ends[inside] - lengths[inside])
        done = stop
    return place


def in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Where an order that nobody else needs is built."""
    return np.empty(shape, dtype)


class Store:
    """A folder of orders. What cannot be written is no error: `reason` says why, and nothing is stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reason: str | None = None
        """Why an order could not be stored."""

    def path(self, cut: Cut, epoch: int, index_file: Path) -> Path:
        """Where the order of an epoch is, or would be."""
        key = hashlib.blake2b(digest_size=12)
        key.update(self._lengths_hash(cut, index_file))
        key.update(repr(("order-2", cut.documents.start, cut.seq_length, cut.seed, epoch)).encode())
        return self.folder / key.hexdigest()

    def _lengths_hash(self, cut: Cut, index_file: Path) -> bytes:
        """Of the documents' lengths; kept beside the orders as long as the `.idx` file is the same one."""
        state = index_file.stat()
        known = self.folder / f"lengths-{cut.documents.start}-{cut.documents.stop}"
        identity = f"{state.st_size} {state.st_mtime_ns} {state.st_ino} {state.st_dev} "
        with contextlib.suppress(OSError, ValueError):
            text = known.read_text()
            if text.startswith(identity):
                return bytes.fromhex(text[len(identity) :])
        content = hashlib.blake2b(digest_size=16)
        for first in range(cut.documents.start, cut.documents.stop, _BLOCK):
            content.update(np.ascontiguousarray(cut.lengths[first : min(first + _BLOCK, cut.documents.stop)]))
        with contextlib.suppress(OSError):
            if self.folder.is_dir():
                write_atomically(known, identity + content.hexdigest())
        return content.digest()

    def load(self, path: Path, cut: Cut) -> EpochOrder | None:
        """The stored order, mapped; None when there is none, or files of other sizes."""
        try:
            arrays = [np.load(path / f"{name}.npy", mmap_mode="r") for name in EpochOrder._fields]
        except Exception:  # a damaged header raises whatever Python's tokenizer and parser do
            return None
        shapes = [(len(cut.documents),), (cut.samples + 1, 2), (cut.samples,)]
        kinds = [np.dtype(kind) for kind in (np.int32, np.int32, np.uint32)]
        if [array.shape for array in arrays] != shapes or [array.dtype for array in arrays] != kinds:
            return None
        for array in arrays:
            map_at_once(array)
        return EpochOrder(*arrays)

    def get(self, cut: Cut, epoch: int, index_file: Path) -> EpochOrder | None:
        """The order of an epoch, stored before or built and stored now; None where nothing can be stored."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.path(cut, epoch, index_file)
            lock = None
            while lock is None:
                if (order := self.load(path, cut)) is not None:
                    return order
                lock = self._take_turn(path)
            with lock:
                if (order := self.load(path, cut)) is None:
                    self._write(path, cut, epoch)
                    order = self.load(path, cut)
                with contextlib.suppress(OSError):
                    Path(lock.name).unlink()
                return order
        except OSError as error:
            self.reason = f"{self.folder}: {error.strerror or error}"
            return None

    def _take_turn(self, path: Path) -> IO[str] | None:
        """The lock under which an order is built; None, after a while, when another process has it."""
        try:
            return take_lock(path.with_name(f"{path.name}.lock"))
        except HeldError:
            time.sleep(_POLL)
            return None

    def _write(self, path: Path, cut: Cut, epoch: int) -> None:
        """Whole, or not at all. Two nodes on a disk without locks both build; the first to rename wins."""
        node = os.uname().nodename
        for left in (path, *path.parent.glob(f"{path.name}.tmp-{node}-*")):  # damaged, or by a killed process
            shutil.rmtree(left, ignore_errors=True)
        unfinished = path.with_name(f"{path.name}.tmp-{node}-{os.getpid()}")
        unfinished.mkdir(parents=True)
        try:
            arrays: list[np.memmap] = []

            def mapped(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
                file = unfinished / f"{name}.npy"
                array = np.lib.format.open_memmap(str(file), "w+", dtype, shape)
                with file.open("r+b") as opened:  # writing to a map without room would end the process
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
                arrays.append(array)
                return array

            build(cut, epoch, mapped)
            for array in arrays:
                array.flush()
            with contextlib.suppress(OSError):  # the other node's is there
                os.rename(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def map_at_once(array: Any) -> None:
    """Enters a mapped file's pages into this process's page table in one call (Linux 5.14), if they are few.

    Else each first touch costs a fault of its own, and a larger corpus has more places to touch first.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if array.nbytes <= _POPULATED:
            array._mmap.madvise(_MADV_POPULATE_READ)
