"""Which corpus gives sample k: a weighted blend whose beginning never depends on its length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Builder = Callable[[np.ndarray, int], np.ndarray]
"""(weights float64 (corpora,), samples) -> corpus of each sample, int16 (samples,), a greedy rule whose
first samples are the same for any number of samples."""

_BLOCK = 1 << 14


class Blend:
    """The corpora of samples 0, 1, 2, ... at fixed weights.

    Grows by doubling as later samples are asked for. Two bytes a sample stay in memory, and counts at
    every `_BLOCK` samples.
    """

    def __init__(self, weights: Sequence[float], build: Builder) -> None:
        self._weights = np.asarray(weights, np.float64) / np.sum(weights)
        self._build = build
        self._which = np.empty(0, np.int16)
        self._before = np.zeros((1, len(weights)), np.int64)

    def locate(self, k: int) -> tuple[int, int]:
        """(corpus, how many earlier samples of the blend it gave) of sample `k`."""
        if len(self._weights) == 1:
            return 0, k
        self._grow(k + 1)
        corpus = int(self._which[k])
        block = k // _BLOCK
        earlier = int(np.count_nonzero(self._which[block * _BLOCK : k] == corpus))
        return corpus, int(self._before[block, corpus]) + earlier

    def counts(self, k: int) -> list[int]:
        """How many of the first `k` samples each corpus gave."""
        if len(self._weights) == 1:
            return [k]
        self._grow(k)
        block = k // _BLOCK
        rest = np.bincount(self._which[block * _BLOCK : k], minlength=len(self._weights))
        return (self._before[block] + rest).tolist()

    def _grow(self, samples: int) -> None:
        if samples <= len(self._which):
            return
        size = _BLOCK
        while size < samples:
            size *= 2
        self._which = self._build(self._weights, size)
        blocks = self._which.reshape(-1, _BLOCK)
        counts = [np.bincount(block, minlength=len(self._weights)) for block in blocks]
        self._before = np.concatenate(
            [np.zeros((1, len(self._weights)), np.int64), np.cumsum(counts, axis=0)]
        )


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
