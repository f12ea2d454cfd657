"""The architecture: a model folder's `config.json`, typed and strict."""

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, PositiveInt, model_validator

from aquila.config.rope import RopeScaling
from aquila.config.strict import StrictModel, validate
from aquila.core.errors import UserError
from aquila.core.text_files import read_json

FunctionKey = Literal["n_heads", "n_kv_heads", "norm_eps", "rope_theta", "rope_scaling"]
"""Keys that change what the same weights compute."""


class ModelConfig(StrictModel):
    """`config.json` of a model folder. The original recipe's keys keep their names and meanings."""

    dim: PositiveInt = 4096
    """Width of the hidden states."""
    n_layers: PositiveInt = 32
    n_heads: PositiveInt = 32
    n_kv_heads: PositiveInt | None = None
    """Heads of keys and values (grouped-query attention); the same as `n_heads` when absent."""
    head_dim: PositiveInt = Field(
        default_factory=lambda given: given.get("dim", 0) // given.get("n_heads", 1)
    )
    """Width of a head; dim / n_heads when absent."""
    vocab_size: PositiveInt = 100008
    multiple_of: PositiveInt = 256
    """The feed-forward size is rounded up to a multiple of this."""
    ffn_dim_multiplier: float = Field(1.0, gt=0, le=1000)
    hidden_dim: PositiveInt | None = None
    """The feed-forward size outright, for imported models whose size no formula gives."""
    tied_embeddings: bool = False
    """The output matrix is the embedding."""
    norm_eps: float = Field(1e-5, gt=0)
    max_seq_len: PositiveInt = 2048
    """Longest context the model is trained for, in tokens."""
    rope_theta: float = Field(10000.0, gt=1)
    """Base of the rotary embedding's frequencies."""
    rope_scaling: RopeScaling | None = None
    """Angles stretched for a longer context than that of the first training."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of every matrix's first value."""
    flash_atten: bool = False
    """Original key: a fused attention kernel. Accepted; the run key `attention` decides."""
    flash_atten_llama_style: bool = False
    """Original key. Accepted; the run key `attention` decides."""
    use_triangle_attn: bool = False
    """Block-triangular attention on NPU; elsewhere the fused kernel computes the same function."""
    checkpoint_activations: bool = False
    """Recompute activations in backward; `ckpoint_layer` says in how many layers."""
    ckpoint_layer: int = Field(-1, ge=-1)
    """With `checkpoint_activations`: recompute the first N layers, -1 all of them."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if "head_dim" not in self.model_fields_set and self.dim % self.n_heads:
            raise ValueError(
                f"dim {self.dim} is not a multiple of n_heads {self.n_heads}, and head_dim is absent"
            )
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} must be even for rotary embedding")
        if self.rope_scaling and self.rope_scaling.rope_type == "dynamic" and self.head_dim < 4:
            raise ValueError(f"rope_scaling: dynamic needs a head size of 4 or more, not {self.head_dim}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    def why_not_shared(self, size: int, length: int) -> str | None:
        """Why `size` ranks cannot share samples of `length` positions and the heads of attention, if so."""
        if length % size:
            return f"does not divide seq_length {length}"
        if self.n_heads % size:
            return f"does not divide the {self.n_heads} heads, which attention shares"
        if self.kv_heads % size and size % self.kv_heads:
            return (
                f"neither divides the {self.kv_heads} heads of keys and values nor is a multiple of them: no "
                "rank would hold whole heads"
            )
        return None

    @property
    def ffn_dim(self) -> int:
        """Feed-forward size: multiple_of * ceil(int(multiplier * int(8 dim / 3)) / multiple_of)."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        size = int(self.ffn_dim_multiplier * int(8 * self.dim / 3))
        return self.multiple_of * -(-size // self.multiple_of)

    @property
    def checkpointed_layers(self) -> int:
        """How many layers, from the first, recompute their activations in backward."""
        if not self.checkpoint_activations:
            return 0
        return self.n_layers if self.ckpoint_layer == -1 else min(self.ckpoint_layer, self.n_layers)

    def function(self) -> dict[str, Any]:
        """The values that decide, besides the weights, what the model computes."""
        values = {key: getattr(self, key) for key in get_args(FunctionKey)}
        scaling = self.rope_scaling.to_dict() if self.rope_scaling else None
        return {**values, "n_kv_heads": self.kv_heads, "rope_scaling": scaling}

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json`."""
        scaling = {"rope_scaling": self.rope_scaling.to_dict()} if self.rope_scaling else {}
        return {**self.model_dump(exclude_none=True), **scaling}

    def parameter_count(self) -> int:
        """All parameters, embedding and output matrix included."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.kv_heads)
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        tables = 1 if self.tied_embeddings else 2
        return tables * self.vocab_size * self.dim + self.n_layers * block + self.dim

    def flops_per_token(self, seq_length: int) -> float:
        """Training FLOPs a token: 6 (parameters - embedding) + 6 layers n_heads head_dim seq_length.

        Six per weight of every matrix product (two forward, four backward); causal attention's two
        products over half of the square, forward and backward (PaLM, arXiv 2204.02311, appendix B,
        with the causal half counted once).
        """
        lookups = 0 if self.tied_embeddings else self.vocab_size * self.dim  # a tied one is multiplied, too
        weights = self.parameter_count() - lookups
        return 6.0 * weights + 6.0 * self.n_layers * self.n_heads * self.head_dim * seq_length


def load_model_config(model_dir: str | Path) -> ModelConfig:
    """Reads `config.json` of `model_dir`.

    Raises `UserError` for a missing folder or file, broken JSON, an unknown key (naming the nearest
    known one) or a value of the wrong type.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        near = sorted(p.name for p in folder.parent.glob("*") if p.is_dir()) if folder.parent.is_dir() else []
        known = f"; {folder.parent} has: {', '.join(near)}" if near else ""
        raise UserError(f"model folder {folder} does not exist{known}")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: a model folder needs its architecture file config.json")
    return validate(ModelConfig, read_json(path), str(path))
