"""Small models, and a meter of the memory that tensors hold."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aquila.config import ModelConfig


class MemoryMeter(TorchDispatchMode):
    """Bytes of the storages made inside the block: `held` now, `peak` at most."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in old:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size):
        self.held -= size


@pytest.fixture
def memory_meter():
    return MemoryMeter


@pytest.fixture
def small_config():
    """Grouped queries, odd sizes, a rotary base of its own."""

    def make(**changes):
        sizes = {"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 8, "vocab_size": 211}
        return ModelConfig(**{**sizes, "max_seq_len": 64, "rope_theta": 50000.0, **changes})

    return make
