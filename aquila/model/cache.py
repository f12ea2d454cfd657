"""The keys and values of tokens already seen, for generation."""

import torch
from torch import Tensor

from aquila.config import ModelConfig


class KVCache:
    """Room for `max_length` tokens of each of `batch_size` rows, all layers.

    `length` is how many tokens it holds; set it lower to take tokens back. Keys and values are
    (batch, max_length, kv heads, head size) a layer: 2 layers kv_heads head_dim itemsize bytes a token.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.n_layers, batch_size, max_length, config.kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.max_length = max_length
        self._documents: Tensor | None = None  # (batch, max_length), once documents were given

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new k, v (B, S, K, D) behind those held; returns all of them (B, T, K, D)."""
        end = self.length + k.shape[1]
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def extend(self, seq: int, documents: Tensor | None) -> Tensor | None:
        """The documents (B, T) of the tokens held and of `seq` new ones; None when none were ever given.

        New tokens without `documents` (B, S) continue the last document. A batch of prompts of unequal
        length is padded on the left with document 0 and carries document 1, and is then computed exactly.
        Raises `ValueError` when the new tokens do not fit.
        """
        end = self.length + seq
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.length} of {self.max_length} tokens: {seq} more do not fit"
            )
        if documents is None and self._documents is None:
            return None
        if self._documents is None:
            shape = (self.keys.shape[1], self.max_length)
            self._documents = torch.zeros(shape, dtype=torch.int64, device=self.keys.device)
        if documents is None:
            documents = self._documents[:, max(self.length - 1, 0), None]
        self._documents[:, self.length : end] = documents
        return self._documents[:, :end]
