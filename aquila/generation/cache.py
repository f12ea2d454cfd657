"""Keys and values for rows that stand at different lengths, laid out for one-token steps."""

import torch
from torch import Tensor

from aquila.config import ModelConfig


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

    def enter(self, rows: int, length: int) -> "Entering":
        """New last rows for prompts of one length: what the model takes as its cache while it reads them."""
        return Entering(self, rows, length)

    def remove(self, row: int) -> None:
        """Frees a row; the last row moves into its place."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            self.kv[:, row, :, :length] = self.kv[:, last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()


class Entering:
    """Stands in for the model's `KVCache` while whole prompts of one length are read: keys and values go
    straight to their rows.
    """

    def __init__(self, cache: RowCache, rows: int, length: int):
        self.length = 0
        self._cache, self._lengths = cache, [length] * rows
        self._rows = slice(len(cache.lengths), len(cache.lengths) + rows)

    def extend(self, seq: int, documents: Tensor | None) -> Tensor | None:
        """As `KVCache.extend`; a prompt is one document."""
        return documents

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (n, S, K, D) of one layer; attention over whole prompts needs no others."""
        rows = self._cache.kv[layer, self._rows]
        rows[:, : self._cache.heads, : k.shape[1]] = k.transpose(1, 2)
        rows[:, self._cache.heads :, : v.shape[1]] = v.transpose(1, 2)
        return k, v

    def done(self) -> None:
        """The rows are in use from now on."""
        self._cache.lengths += self._lengths
