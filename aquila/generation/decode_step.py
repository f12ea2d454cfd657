"""One new token for every row: the model's forward at its smallest, with as few calls as it takes.

At one token a row the weights are read once for little arithmetic, so time is memory bandwidth plus the
overhead of every call. Hence the fused matrices (query, key and value in one; gate and up in one), and
rotation, cache and attention in one operation of the backend. Tests hold it equal to `AquilaModel`.

Shapes: n rows, H query heads, K key and value heads, D head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aquila.backend import get_backend
from aquila.backend.reference import StepRows
from aquila.generation.cache import RowCache
from aquila.generation.int8 import Int8Linear
from aquila.model import AquilaModel


class Matrix(NamedTuple):
    """A weight (N, K), for int8 with its scale fp32 (N,)."""

    weight: Tensor
    scale: Tensor | None = None


def fuse(parts: list[nn.Module]) -> Matrix:
    """The weights of `parts` as one matrix, rows after rows.

    The parts' own weights become views of it: nothing is held twice, and the model stays whole.
    """
    if isinstance(parts[0], Int8Linear):
        return Matrix(_join(parts, "int8"), _join(parts, "scale"))
    return Matrix(_join(parts, "weight"))


def _join(parts: list[nn.Module], name: str) -> Tensor:
    pieces = [getattr(part, name).detach() for part in parts]
    if len(pieces) == 1:
        return pieces[0]
    first, rows = pieces[0], sum(len(piece) for piece in pieces)
    ends = [piece.data_ptr() + piece.nbytes for piece in pieces]
    if [piece.data_ptr() for piece in pieces[1:]] == ends[:-1]:
        storage = first.untyped_storage()
        if all(piece.untyped_storage().data_ptr() == storage.data_ptr() for piece in pieces):
            return first.as_strided((rows, *first.shape[1:]), first.stride())  # joined before
    joined = torch.cat(pieces)
    for part, view in zip(parts, joined.split([len(piece) for piece in pieces]), strict=True):
        getattr(part, name).data = view
    return joined


class DecodeStep:
    """`step(tokens, cache)`: logits of the next token of every row, and the cache one token longer."""

    def __init__(self, model: AquilaModel):
        self.model = model
        self.backend = get_backend(model.tok_embeddings.weight.device.type)
        self.head_dim = model.config.head_dim
        self.layers = [
            (
                layer.attention_norm,
                fuse([layer.attention.wq, layer.attention.wk, layer.attention.wv]),
                fuse([layer.attention.wo]),
                layer.ffn_norm,
                fuse([layer.feed_forward.w1, layer.feed_forward.w3]),
                fuse([layer.feed_forward.w2]),
            )
            for layer in model.layers
        ]
        self.output = fuse([model.output])
        for layer in self.layers:
            for matrix in (part for part in layer if isinstance(part, Matrix)):
                self.backend.prepare_weight(matrix.weight)
        self.backend.prepare_weight(self.output.weight)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: RowCache) -> Tensor:
        """tokens int64 (n,), each row's latest, not yet in `cache`; returns logits (n, V)."""
        backend, model, n = self.backend, self.model, tokens.shape[0]
        linear = backend.step_linear
        rows = self._rows(cache.lengths, tokens.device)
        x = backend.embedding(tokens, model.tok_embeddings.weight)  # (n, dim)
        for (attention_norm, wqkv, wo, ffn_norm, w13, w2), kv in zip(self.layers, cache.kv, strict=True):
            qkv = linear(attention_norm(x), *wqkv).view(n, -1, self.head_dim)  # (n, H + 2 K, D)
            x = x + linear(backend.step_attention(qkv, kv[:n], rows), *wo)
            gate, up = linear(ffn_norm(x), *w13).chunk(2, dim=-1)
            x = x + linear(backend.swiglu(gate, up), *w2)
        cache.lengths = [length + 1 for length in cache.lengths]
        return linear(model.norm(x), *self.output)

    def _rows(self, lengths: list[int], device: torch.device) -> StepRows:
        return StepRows(
            lengths, torch.tensor(lengths, device=device), *self.model.rotary_tables.at(lengths, device)
        )
