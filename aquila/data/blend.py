"""Which corpus gives sample k: a weighted blend whose beginning never depends on its length."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aquila.backend.cpu_kernels import data_order

_BLOCK = 1 << 14
_KEPT = 4
"""Blocks of which every sample's corpus stays in memory."""


class Blend:
    """The corpora of samples 0, 1, 2, ... at fixed weights.

    What each corpus has given is kept at every `_BLOCK` samples, up to the farthest that was asked for; a
    block's samples are computed from there: half a byte a sample in memory for a blend of a thousand corpora.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = np.asarray(weights, np.float64) / np.sum(weights)
        self._before = np.zeros((1, len(weights)), np.int64)  # at blocks 0, 1, ...; grows by doubling
        self._known = 1
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()  # a thread reads ahead of training

    def locate(self, k: int) -> tuple[int, int]:
        """(corpus, how many earlier samples of the blend it gave) of sample `k`."""
        if len(self._weights) == 1:
            return 0, k
        block, place = divmod(k, _BLOCK)
        which = self._block(block)
        corpus = int(which[place])
        earlier = int(np.count_nonzero(which[:place] == corpus))
        return corpus, int(self._before[block, corpus]) + earlier

    def counts(self, k: int) -> list[int]:
        """How many of the first `k` samples each corpus gave."""
        if len(self._weights) == 1:
            return [k]
        block, place = divmod(k, _BLOCK)
        rest = np.bincount(self._block(block)[:place], minlength=len(self._weights))
        return (self._before[block] + rest).tolist()

    def _block(self, number: int) -> np.ndarray:
        """The corpus of each sample of a block, int16 (_BLOCK,)."""
        with self._lock:
            while self._known <= number:
                self._compute(self._known - 1)
            if number not in self._blocks:
                self._compute(number)
            self._blocks.move_to_end(number)
            return self._blocks[number]

    def _compute(self, number: int) -> None:
        counts = self._before[number].copy()
        self._blocks[number] = data_order.blend(self._weights, counts, number * _BLOCK, _BLOCK)
        if len(self._blocks) > _KEPT:
            self._blocks.popitem(last=False)
        if number + 1 == self._known:
            if self._known == len(self._before):
                self._before = np.concatenate([self._before, np.empty_like(self._before)])
            self._before[self._known] = counts
            self._known += 1


@dataclass
class Segment:
    """A stretch of a run at fixed weights."""

    start: int
    """First sample of the run that it gives."""
    weights: dict[str, float]
    """Normalized weight of each corpus, by its path."""
    consumed: dict[str, int] = field(default_factory=dict)
    """Samples of each corpus consumed before `start`."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"start": self.start, "weights": self.weights, "consumed": self.consumed}
