"""Micro batches for the model: tokens, labels, loss mask, document numbers, prepared ahead in a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from aquila.backend import get_backend
from aquila.data.indexed import SampleStream
from aquila.data.sampler import micro_batch_indices

_AHEAD = 4
"""Micro batches that wait ready."""


@dataclass(frozen=True)
class Batch:
    """One micro step of one rank; every tensor is (micro batch, seq_length)."""

    tokens: torch.Tensor
    """int64 inputs."""
    labels: torch.Tensor
    """int64: the token after each input. Shifted here, once; the model never shifts."""
    loss_mask: torch.Tensor
    """float32: 1 where the label counts. A new tensor in every batch: nobody's edits reach another.

    With document numbers, predicting the first token of the next document from the end of the one
    before does not count, nor does what a corpus's loss mask leaves out; nothing else, whatever its id."""
    documents: torch.Tensor | None
    """int64: which document of its row each input belongs to; None for plain causal attention."""
    first_sample: int
    """The batch's first sample of the stream; its samples are consecutive."""
    corpora: torch.Tensor
    """int64 (micro batch,): of which corpus of the stream each sample is, by its place there."""


def make_batch(stream: SampleStream, samples: range, document_mask: bool = False) -> Batch:
    """The batch of these samples, on the CPU."""
    drawn = [stream[k] for k in samples]
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in drawn]))
    loss_mask = torch.ones(len(drawn), tokens.shape[1] - 1)
    for row, sample in zip(loss_mask, drawn, strict=True):
        if sample.mask is not None:
            row.copy_(torch.from_numpy(sample.mask[1:]))
    documents = None
    if document_mask:
        numbers = torch.from_numpy(np.stack([sample.documents for sample in drawn]))
        loss_mask[numbers[:, 1:] != numbers[:, :-1]] = 0.0
        documents = numbers[:, :-1].contiguous()
    corpora = torch.tensor([stream.place_of(sample.provenance.corpus) for sample in drawn])
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(inputs, labels, loss_mask, documents, samples.start, corpora)


def evaluation_batches(
    stream: SampleStream,
    samples: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    *,
    document_mask: bool = False,
    device: torch.device,
) -> Iterator[Batch]:
    """This rank's share of the stream's first `samples`, each in one batch of one rank alone.

    Every rank gets equally many batches, as ZeRO-3 needs; those beyond the last sample count no token.
    """
    for start in range(0, samples, world_size * micro_batch_size):
        first = start + rank * micro_batch_size
        mine = range(first, min(first + micro_batch_size, samples))
        batch = make_batch(stream, mine or range(1), document_mask)
        if not mine:
            batch.loss_mask.zero_()
        yield _moved(batch, device)


class Batches:
    """Iterator over the micro batches of one rank, from `consumed_samples` on, without end.

    A thread reads ahead; its errors come out of `next`. `close` ends it.
    """

    def __init__(
        self,
        stream: SampleStream,
        consumed_samples: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        *,
        document_mask: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self._stream = stream
        self._consumed = consumed_samples
        self._place = (rank, world_size, micro_batch_size)
        self._document_mask = document_mask
        self._device = torch.device(device) if device is not None else torch.device("cpu")
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(_AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._closing.is_set():
            raise StopIteration
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        return _moved(batch, self._device)

    def close(self) -> None:
        """Ends the reading thread. Closing twice is no mistake."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue

    def _read_ahead(self) -> None:
        rank, world_size, micro_batch_size = self._place
        consumed = self._consumed
        try:
            while not self._closing.is_set():
                samples = micro_batch_indices(consumed, rank, world_size, micro_batch_size)
                batch = make_batch(self._stream, samples, self._document_mask)
                self._hand_over(batch if self._device.type == "cpu" else _pinned(batch))
                self._stream.prepare_next(samples.start)
                consumed += world_size * micro_batch_size
        except BaseException as error:
            self._hand_over(error)

    def _hand_over(self, item: Batch | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def _moved(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))
    if batch.documents is not None and moved.documents is not None:
        get_backend(device.type).know_documents(batch.documents, moved.documents)
    return moved


def _pinned(batch: Batch) -> Batch:
    """In page-locked memory, so that the copy to the device overlaps with computing."""
    return _mapped(batch, torch.Tensor.pin_memory)


def _mapped(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    documents = None if batch.documents is None else change(batch.documents)
    moved = change(batch.tokens), change(batch.labels), change(batch.loss_mask)
    return Batch(*moved, documents, batch.first_sample, change(batch.corpora))
