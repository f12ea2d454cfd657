"""Keys and values for rows that stand at different lengths, laid out for one-token steps."""

import torch
from torch import Tensor

from aquila.config import ModelConfig
from aquila.model import KVCache

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
        self._zeroed = 0

    def append(self, cache: KVCache, row: int, length: int) -> None:
        """A new last row: the first `length` tokens of `row` of a prefilled cache."""
        new = len(self.lengths)
        self.reach(length)
        keys, values = cache.keys[:, row, :length], cache.values[:, row, :length]  # (layers, T, K, D)
        self.kv[:, new, : self.heads, :length] = keys.transpose(1, 2)
        self.kv[:, new, self.heads :, :length] = values.transpose(1, 2)
        self.lengths.append(length)

    def reach(self, length: int) -> None:
        """Makes the first `length` places of every row finite: a masked NaN would still spoil the product."""
        if length > self._zeroed:
            end = min(-(-length // _ZERO_BLOCK) * _ZERO_BLOCK, self.max_length)
            self.kv[:, :, :, self._zeroed : end] = 0
            self._zeroed = end

    def remove(self, row: int) -> int:
        """Frees a row; the last row moves into its place. Returns the moved row's old number."""
        last = len(self.lengths) - 1
        if row != last:
            length = self.lengths[last]
            self.kv[:, row, :, :length] = self.kv[:, last, :, :length]
            self.lengths[row] = length
        self.lengths.pop()
        return last

    def visible(self) -> Tensor | None:
        """Which keys each row's next token sees: bool (n, 1, 1, T), itself included; None: all T."""
        if min(self.lengths) == max(self.lengths):
            return None
        device = self.kv.device
        last = torch.tensor(self.lengths, device=device)[:, None]
        return (torch.arange(max(self.lengths) + 1, device=device) <= last)[:, None, None]
