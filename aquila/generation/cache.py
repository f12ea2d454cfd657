"""Keys and values for rows that stand at different lengths, laid out for one-token steps."""

import torch
from torch import Tensor

from aquila.config import ModelConfig

_ZERO_BLOCK = 256


class RowCache:
    """Room for `max_length` tokens in each of `rows` rows; every row has its own length.

    Rows in use are 0 .. n-1 without gaps, so that a step works on views. `kv` is (layers, rows, 2 K, T, D):
    K key heads, then K value heads, head size D.
    """

    def __init__(
        self, config: ModelConfig, rows: int, max_length: int, device: torch.device, dtype: torch.dtype
    ):
        self.heads = config.kv_heads
        self.max_length = max_length
        # Not zeroed here: memory is touched, and so really taken, only as far as tokens reach.
        shape = (config.n_layers, rows, 2 * self.heads, max_length, config.head_dim)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.lengths: list[int] = []
        self._written = [0] * rows  # places of each row that hold numbers and not what memory held before

    def enter(self, lengths: list[int]) -> "Entering":
        """New last rows for prompts of `lengths`: what the model takes as its cache while it reads them."""
        return Entering(self, lengths)

    def wrote(self, row: int, length: int) -> None:
        """Notes that the first `length` places of a row hold numbers."""
        self._written[row] = max(self._written[row], length)

    def reach(self, length: int) -> None:
        """Makes the first `length` places of the rows in use finite: a masked NaN would spoil the product."""
        for row in range(len(self.lengths)):
            start = self._written[row]
            if length > start:
                end = min(-(-length // _ZERO_BLOCK) * _ZERO_BLOCK, self.max_length)
                self.kv[:, row, :, start:end] = 0
                self._written[row] = end

    def remove(self, row: int) -> None:
        """Frees a row; the last row moves into its place."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            self.kv[:, row, :, :length] = self.kv[:, last, :, :length]
            self.wrote(row, length)
            self.lengths[row] = length
        self.lengths.pop()

    def visible(self) -> Tensor | None:
        """Which keys each row's next token sees: bool (n, 1, 1, T), itself included; None: all T."""
        if min(self.lengths) == max(self.lengths):
            return None
        device = self.kv.device
        last = torch.tensor(self.lengths, device=device)[:, None]
        return (torch.arange(max(self.lengths) + 1, device=device) <= last)[:, None, None]


class Entering:
    """Stands in for the model's `KVCache` while whole prompts are read: keys and values go straight to their
    rows. Prompts shorter than the longest are padded on the right; what the padding leaves in a row lies
    beyond its length and is overwritten.
    """

    def __init__(self, cache: RowCache, lengths: list[int]):
        self.length = 0
        self._cache, self._lengths = cache, lengths
        self._first = len(cache.lengths)

    def extend(self, seq: int, documents: Tensor | None) -> Tensor | None:
        """As `KVCache.extend`; a prompt is one document."""
        return documents

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (n, S, K, D) of one layer; attention over whole prompts needs no others."""
        rows = self._cache.kv[layer, self._first : self._first + len(self._lengths)]
        rows[:, : self._cache.heads, : k.shape[1]] = k.transpose(1, 2)
        rows[:, self._cache.heads :, : v.shape[1]] = v.transpose(1, 2)
        return k, v

    def done(self) -> None:
        """The rows are in use from now on."""
        for row, length in enumerate(self._lengths, self._first):
            self._cache.wrote(row, max(self._lengths))
            self._cache.lengths.append(length)
