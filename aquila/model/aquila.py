"""Aquila, exactly: a LLaMA-style decoder with interleaved rotary embedding.

Shapes: B batch, S positions of this call, T positions seen so far (T = cache length + S), dim width,
H query heads, K key and value heads, D head size, V vocabulary. Attribute names give exactly
the parameter names of the released weights (`layers.0.attention.wq.weight`, ...).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from aquila.backend import ATTENTION_KINDS, get_backend
from aquila.backend.reference import StepRows
from aquila.config import ModelConfig
from aquila.model.cache import KVCache
from aquila.model.linear import JoinedProducts, Linear
from aquila.model.loss import cross_entropy
from aquila.model.rotary import RotaryTables, positions_in_documents
from aquila.model.sequence_parallel import SequenceShard


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, fp32 inside."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return get_backend(x.device.type).rms_norm(x, self.weight, self.eps)


class Embedding(nn.Embedding):
    """A row of the table for each token, by the device's way of summing its gradient."""

    def reset_parameters(self) -> None:
        """Nothing: values come later, and torch's on device "meta" would import its compiler (1 s, 25 MB)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return get_backend(self.weight.device.type).embedding(tokens, self.weight)


def _linear(inputs: int, outputs: int) -> Linear:
    return Linear(inputs, outputs, bias=False, device="meta")


class Attention(JoinedProducts):
    """Causal attention with H query heads over K key and value heads."""

    JOINED = ("wq", "wk", "wv")

    def __init__(self, config: ModelConfig, kind: str):
        super().__init__()
        self.kind = kind
        self.shard: SequenceShard | None = None
        self.head_dim = config.head_dim
        kv_dim = config.kv_heads * config.head_dim
        width = config.n_heads * config.head_dim
        self.wq = _linear(config.dim, width)
        self.wk = _linear(config.dim, kv_dim)
        self.wv = _linear(config.dim, kv_dim)
        self.wo = _linear(width, config.dim)

    def forward(
        self,
        x: Tensor,  # (B, S, dim)
        cos: Tensor,  # (1 or B, S, D / 2)
        sin: Tensor,
        documents: Tensor | None,  # (B, T)
        cache: tuple[KVCache, int] | None,  # the cache and this layer's number in it
    ) -> Tensor:  # (B, S, dim)
        backend = get_backend(x.device.type)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.outputs(x))
        q = backend.rotary(q, cos, sin)  # (B, S, H, D)
        k = backend.rotary(k, cos, sin)  # (B, S, K, D)
        v = v.contiguous()  # kept for backward, and not the joined output with it
        if self.shard is not None:
            q, k, v = self.shard.to_heads(q, k, v)
        start = 0
        if cache is not None:
            store, layer = cache
            start = store.length
            k, v = store.put(layer, k, v)  # (B, T, K, D)
        kind = backend.attention_kind(self.kind)
        out = backend.attention(q, k, v, kind=kind, documents=documents, start=start)  # (B, S, H, D)
        if self.shard is not None:
            out = self.shard.to_positions(out)
        return self.wo(out.flatten(-2))

    def step(self, x: Tensor, kv: Tensor, rows: StepRows) -> Tensor:
        """x (n, dim), one new token a row; kv, rows: of `step_attention`. Returns (n, dim)."""
        qkv = self.products(x).view(len(x), -1, self.head_dim)  # (n, H + 2 K, D)
        return self.wo(get_backend(x.device.type).step_attention(qkv, kv, rows))


class FeedForward(JoinedProducts):
    """w2(silu(w1 x) * w3 x)."""

    JOINED = ("w1", "w3")
    TAKEN_APART = False

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = _linear(dim, hidden_dim)
        self.w2 = _linear(hidden_dim, dim)
        self.w3 = _linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        backend = get_backend(x.device.type)
        if self.whole is None:
            return self.w2(backend.swiglu(self.w1(x), self.w3(x)))
        return self.w2(backend.swiglu_halves(self.products(x)))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normed input and added to the stream."""

    def __init__(self, config: ModelConfig, kind: str):
        super().__init__()
        self.attention = Attention(config, kind)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Tensor | None = None,
        cache: tuple[KVCache, int] | None = None,
    ) -> Tensor:  # all as in Attention
        return self._layer(x, self.attention, cos, sin, documents, cache)

    def step(self, x: Tensor, kv: Tensor, rows: StepRows) -> Tensor:  # all as in Attention.step
        """The layer for one new token a row."""
        return self._layer(x, self.attention.step, kv, rows)

    def _layer(self, x: Tensor, attention: Callable[..., Tensor], *rest: Any) -> Tensor:
        x = x + attention(self.attention_norm(x), *rest)
        return x + self.feed_forward(self.ffn_norm(x))


class AquilaModel(nn.Module):
    """The whole model: tokens to logits, or with labels to the loss.

    `attention` is one of auto, fused, triangle, reference. `recompute` says what the checkpointed layers
    (`config.checkpointed_layers`, from the first) compute again in backward: "full", all of the layer, or
    "selective", all but attention. `z_loss` weights the loss's z-term. `seed` sets the first weights
    (`first_weights`); on device "meta" there are none, with None they are whatever was in memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention: str = "auto",
        recompute: str = "full",
        z_loss: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int | None = 2023,
    ):
        super().__init__()
        if recompute not in ("full", "selective"):
            raise ValueError(f"recompute '{recompute}' is not one of full, selective")
        if attention not in ("auto", *ATTENTION_KINDS):
            raise ValueError(f"attention '{attention}' is not one of auto, {', '.join(ATTENTION_KINDS)}")
        device = torch.device(device)
        self.config, self.attention, self.recompute, self.z_loss = config, attention, recompute, z_loss
        self.shard: SequenceShard | None = None
        self.tok_embeddings = Embedding(config.vocab_size, config.dim, device="meta")
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = _linear(config.dim, config.vocab_size)
        if config.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.rotary_tables = RotaryTables(
            config.head_dim, config.rope_theta, config.max_seq_len, config.rope_scaling
        )
        for name, parameter in list(self.named_parameters()):
            self.place(name, torch.empty(parameter.shape, dtype=dtype, device=device))
        if device.type != "meta" and seed is not None:
            self.init_weights(seed)

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **config_overrides,
    ) -> "AquilaModel":
        """The model of a folder: its configuration and weights, straight to `dtype` and `device`.

        Any folder that `model.weights` reads will do. `config_overrides` are keys of `ModelConfig`, or
        `attention`, `recompute`, `z_loss`. Raises `UserError` for what is missing, unexpected or misshapen.
        """
        from aquila.model.weights import load_model

        return load_model(cls, model_dir, dtype, device, config_overrides)

    def place(self, name: str, values: Tensor) -> None:
        """Makes `values` the parameter of that name, whatever device and dtype they have."""
        module, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(module), leaf, nn.Parameter(values))
        if self.config.tied_embeddings and module == "tok_embeddings":
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Gives every parameter its first values (`first_weights`)."""
        draw = self.first_weights(seed)
        for name, parameter in self.named_parameters():
            draw(name, parameter)

    def first_weights(self, seed: int) -> Callable[[str, Tensor], None]:
        """What fills a tensor with a parameter's first values: asked for one after the other, in their order.

        Matrices from N(0, initializer_range), norms at one; drawn in fp32 on the CPU, the same for every
        device and dtype.
        """
        generator = torch.Generator().manual_seed(seed)
        most = max(parameter.numel() for parameter in self.parameters())
        place: list[
            Tensor
        ] = []  # of drawing, the same for all: holes would add up beside the shares of ZeRO-3

        def draw(name: str, values: Tensor) -> None:
            if values.dim() == 1:
                values.fill_(1.0)
                return
            plain = values.dtype == torch.float32 and values.device.type == "cpu"
            if not (plain or place):
                place.append(torch.empty(most, dtype=torch.float32, device="cpu"))
            drawn = values if plain else place[0][: values.numel()].view(values.shape)
            drawn.normal_(0.0, self.config.initializer_range, generator=generator)
            if not plain:
                values.copy_(drawn)

        return draw

    def forward(
        self,
        tokens: Tensor,  # int64 (B, S)
        labels: Tensor | None = None,  # int64 (B, S), shifted already
        loss_mask: Tensor | None = None,  # float (B, S)
        documents: Tensor | None = None,  # int64 (B, S)
        cache: KVCache | None = None,
        token_losses: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, S, V) in the model's dtype, or with `labels` their mean loss, a scalar in fp32.

        `documents` numbers each token's document within its row, never decreasing: attention stays within a
        document and positions start anew in each. With `cache` the tokens follow those it holds.
        `token_losses` gets each label's loss, fp32 (B, S), 0 where it does not count.

        After `divide_sequence` the inputs are whole and the results are of this rank's positions; the mean of
        the losses of all ranks is the loss.
        """
        hidden = self.hidden(tokens, documents, cache)
        if labels is None:
            return self.output(hidden)
        total = None
        if self.shard is not None:
            loss_mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
            total = loss_mask.sum() / self.shard.size
            labels, loss_mask = self.shard.part(labels), self.shard.part(loss_mask)
        return cross_entropy(
            hidden,
            self.output.weight,
            labels,
            loss_mask,
            total=total,
            z_loss=self.z_loss,
            token_losses=token_losses,
        )

    def hidden(self, tokens: Tensor, documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, S, dim) after the last norm: what the output matrix takes."""
        start, seq = 0, tokens.shape[1]
        if cache is not None:
            start = cache.length
            documents = cache.extend(seq, documents)  # (B, T): those of the cached tokens, too
        cos, sin = self._angles(start, seq, documents, tokens.device)
        if self.shard is not None:
            tokens, cos, sin = (self.shard.part(whole) for whole in (tokens, cos, sin))
        x = self.tok_embeddings(tokens)
        for number, layer in enumerate(self.layers):
            if cache is not None:
                x = layer(x, cos, sin, documents, (cache, number))
            elif number < self.config.checkpointed_layers and torch.is_grad_enabled():
                x = self._recomputed(layer, x, cos, sin, documents)
            else:
                x = layer(x, cos, sin, documents)
        if cache is not None:
            cache.length += seq
        return self.norm(x)

    def _angles(self, start: int, seq: int, documents: Tensor | None, device: torch.device):
        """cos and sin (1 or B, S, D / 2) of this call's positions."""
        cos, sin = self.rotary_tables.on(device, start + seq)
        if documents is None:
            return cos[None, start : start + seq], sin[None, start : start + seq]
        positions = positions_in_documents(documents)[:, start:]
        return cos[positions], sin[positions]

    def _recomputed(self, layer: Block, *inputs) -> Tensor:
        """`layer(*inputs)`, whose activations are computed again in backward instead of kept."""
        options = {}
        if self.recompute == "selective":
            kept = get_backend(inputs[0].device.type).SAVED_IN_SELECTIVE
            options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_keep, kept))
        # Nothing in a layer is random, so no random state has to be kept and restored.
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    def divide_sequence(self, shard: SequenceShard) -> None:
        """From now on this rank computes its positions of each sample alone, and attention for some heads."""
        self.shard = shard
        for module in self.modules():
            if isinstance(module, Attention):
                module.shard = shard

    def convert_to_fp8(self, recipe: str) -> None:
        """The layers' matrices multiply in float8 from now on; parameters and their names stay as they are.

        Before `compile_blocks`. The embedding and the output matrix, which is the loss's, stay out of it.
        `recipe`: tensorwise or rowwise (`backend/fp8.py`). Raises `UserError` where that cannot be.
        """
        get_backend(self.norm.weight.device.type).convert_to_fp8(self.layers, recipe)

    def compile_blocks(self, **options) -> None:
        """`torch.compile` for each layer on its own; names of parameters stay as they are."""
        get_backend(self.norm.weight.device.type).kernels()  # are looked for outside of any tracing
        for layer in self.layers:
            layer.compile(**options)

    def parameter_count(self) -> int:
        """All parameters, embedding and output matrix included."""
        return sum(parameter.numel() for parameter in self.parameters())


def _keep(kept: tuple, context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE
