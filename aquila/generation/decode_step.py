"""One new token for every row: the model's forward at its smallest, with as few calls as it takes.

At one token a row the weights are read once for little arithmetic, so time is memory bandwidth plus the
overhead of every call. Hence the joined matrices (query, key and value in one; gate and up in one), and
rotation, cache and attention in one operation of the backend, or all layers in one where it has that. Else
the layer is `model.aquila.Block` itself.

Shapes: n rows, H query heads, K key and value heads, D head size.
"""

import torch
from torch import Tensor

from aquila.backend import get_backend
from aquila.backend.reference import LayerWeights, StepRows
from aquila.generation.cache import RowCache
from aquila.generation.int8 import memory_of
from aquila.model import AquilaModel
from aquila.model.aquila import Block
from aquila.model.linear import join_products


class DecodeStep:
    """`step(tokens, cache)`: logits of the next token of every row, and the cache one token longer."""

    def __init__(self, model: AquilaModel):
        self.model = model
        join_products(model, copy=True)
        backend = get_backend(model.tok_embeddings.weight.device.type)
        for layer in model.layers:
            parts = (layer.attention, layer.feed_forward)
            for matrix in (*(part.whole for part in parts), parts[0].wo, parts[1].w2):
                backend.prepare_weight(memory_of(matrix))
        backend.prepare_weight(memory_of(model.output))
        self._layers = backend.prepare_layers([_weights(layer) for layer in model.layers])

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: RowCache) -> Tensor:
        """tokens int64 (n,), each row's latest, not yet in `cache`; returns logits (n, V)."""
        model, n = self.model, tokens.shape[0]
        rows = self._rows(cache.lengths, tokens.device)
        x = model.tok_embeddings(tokens)  # (n, dim)
        kv = cache.kv[:, :n]
        after = None if self._layers is None else self._layers(x, kv, rows)
        if after is None:
            for layer, own in zip(model.layers, kv, strict=True):
                x = layer.step(x, own, rows)
            after = x
        cache.lengths = [length + 1 for length in cache.lengths]
        return model.output(model.norm(after))

    def _rows(self, lengths: list[int], device: torch.device) -> StepRows:
        return StepRows(
            lengths, torch.tensor(lengths, device=device), *self.model.rotary_tables.at(lengths, device)
        )


def _weights(layer: Block) -> LayerWeights:
    """A layer's matrices as they are held, and its norms."""
    attention, feed_forward = layer.attention, layer.feed_forward
    matrices = [
        part
        for matrix in (attention.whole, attention.wo, feed_forward.whole, feed_forward.w2)
        for part in (memory_of(matrix), getattr(matrix, "scale", None))
    ]
    norms = layer.attention_norm.weight, layer.ffn_norm.weight
    return LayerWeights(norms[0], *matrices[:4], norms[1], *matrices[4:], eps=layer.ffn_norm.eps)
