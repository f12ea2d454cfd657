"""One new token for every row: the model's forward at its smallest, with as few calls as it takes.

At one token a row the weights are read once for little arithmetic, so time is memory bandwidth plus the
overhead of every call. Hence the fused matrices (query, key and value in one; gate and up in one) and the
joint rotation of queries and keys. Tests hold it equal to `AquilaModel`.

Shapes: n rows, H query heads, K key and value heads, D head size, T a row's length with its new token.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquila.backend import get_backend
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
        config = model.config
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
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
        linear = self.backend.step_linear
        model, n, width = self.model, tokens.shape[0], self.heads * self.head_dim
        turning = self.heads + self.kv_heads
        longest = max(cache.lengths) + 1
        runs = _runs(cache.lengths)
        rows, places = self._places(cache, len(runs) == 1, tokens.device)
        turn = self._turn(cache.lengths, longest, tokens.device)  # complex64 (n, 1, D / 2)
        x = F.embedding(tokens, model.tok_embeddings.weight)  # (n, dim)
        for (attention_norm, wqkv, wo, ffn_norm, w13, w2), kv in zip(self.layers, cache.kv, strict=True):
            qkv = linear(_norm(x, attention_norm), *wqkv).view(n, -1, self.head_dim)  # (n, H + 2 K, D)
            pairs = torch.view_as_complex(qkv[:, :turning].float().unflatten(-1, (-1, 2)))
            qkv[:, :turning] = torch.view_as_real(pairs * turn).flatten(-2)
            kv[rows, :, places] = qkv[:, self.heads :]
            q = qkv[:, : self.heads].unflatten(1, (self.kv_heads, -1))  # (n, K, H / K, D)
            out = [self._attend(q[run], kv[run, :, :length]) for run, length in runs]
            x = x + linear((out[0] if len(out) == 1 else torch.cat(out)).reshape(n, width), *wo)
            gate, up = linear(_norm(x, ffn_norm), *w13).chunk(2, dim=-1)
            x = x + linear(F.silu(gate) * up, *w2)
        cache.lengths = [length + 1 for length in cache.lengths]
        return linear(_norm(x, model.norm), *self.output)

    def _attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """q (n, K, H / K, D) over all of kv (n, 2 K, T, D)."""
        return F.scaled_dot_product_attention(q, kv[:, : self.kv_heads], kv[:, self.kv_heads :])

    def _places(self, cache: RowCache, same: bool, device: torch.device):
        """Where the new keys and values go: a slice and one place, or an index pair for unequal rows."""
        n = len(cache.lengths)
        if same:
            return slice(0, n), cache.lengths[0]
        return torch.arange(n, device=device), torch.tensor(cache.lengths, device=device)

    def _turn(self, lengths: list[int], longest: int, device: torch.device) -> Tensor:
        cos, sin = self.model.rotary_tables.on(device, longest)
        places = torch.tensor(lengths, device=device)
        return torch.complex(cos[places], sin[places])[:, None]


def _runs(lengths: list[int]) -> list[tuple[slice, int]]:
    """Neighbouring rows of one length, and that length with the new token.

    Each run attends by itself and not under a mask: the sum over more places, be they masked, rounds another
    way, and in bf16 a row would then depend on its neighbours.
    """
    runs, start = [], 0
    for length, rows in itertools.groupby(lengths):
        stop = start + len(list(rows))
        runs.append((slice(start, stop), length + 1))
        start = stop
    return runs


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)
