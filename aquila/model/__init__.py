"""The model: architecture, loss and weight files."""

from aquila.model.aquila import AquilaModel
from aquila.model.cache import KVCache
from aquila.model.loss import cross_entropy
from aquila.model.weights import load_weights, save_weights

__all__ = ["AquilaModel", "KVCache", "cross_entropy", "load_weights", "save_weights"]
