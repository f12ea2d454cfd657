"""Hugging Face's Llama format: names, configuration, and the rotary layout of its query and key matrices.

Aquila rotates the interleaved pairs (2i, 2i + 1) of a head; Hugging Face rotates (i, i + D / 2). The same
function comes out when the rows of wq and wk are reordered within each head.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from aquila.config import ModelConfig
from aquila.config.strict import validate
from aquila.core.errors import UserError
from aquila.core.text_files import read_json
from aquila.model.hf_rope import rope_from_hf, rope_to_hf
from aquila.model.hf_values import Reader

_TOP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}
_LAYER_BACK = {ours: theirs for theirs, ours in _LAYER.items()}
_FEED_FORWARD_FORMULAS = (
    {"multiple_of": 256, "ffn_dim_multiplier": 1.0},
    {"multiple_of": 4096, "ffn_dim_multiplier": 1.3},
)
_MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "aquila": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
"""Values of keys that are absent, where they are not those of Llama (transformers' configurations)."""


def is_hf_names(names: Iterable[str]) -> bool:
    """Whether these parameter names are Hugging Face's."""
    return any(name.startswith("model.layers.") or name == "model.embed_tokens.weight" for name in names)


def to_released(name: str) -> str | None:
    """The released name; None for a table that holds no weights; unknown names come back as they are."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match and match[2] in _LAYER:
        return f"layers.{match[1]}.{_LAYER[match[2]]}"
    return _TOP.get(name, name)


def from_released(name: str) -> str:
    """Hugging Face's name of a released parameter."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"model.layers.{match[1]}.{_LAYER_BACK[match[2]]}" if match else _TOP_BACK[name]


def short(name: str) -> str:
    """A released name without its layer: attention.wq.weight."""
    return re.sub(r"^layers\.\d+\.", "", name)


def permuted(config: ModelConfig) -> dict[str, int]:
    """The matrices whose rows are reordered, and how many heads each holds."""
    return {"attention.wq.weight": config.n_heads, "attention.wk.weight": config.kv_heads}


def permute(weight: Tensor, heads: int) -> Tensor:
    """Aquila's rows to Hugging Face's: within each head (2i, 2i + 1) to (i, i + D / 2)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Hugging Face's rows to Aquila's: the inverse of `permute`."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


# ---- config.json -----------------------------------------------------------------------------------------


def is_hf_config(values: dict[str, Any]) -> bool:
    """Whether a config.json is Hugging Face's."""
    return "hidden_size" in values


def is_tied(folder: Path) -> bool:
    """Whether the folder's config.json says that the output matrix is the embedding."""
    file = folder / "config.json"
    return file.is_file() and bool(read_json(file).get("tie_word_embeddings", False))


def config_from_hf(values: dict[str, Any], where: str) -> ModelConfig:
    """Our configuration of a Llama or Aquila2 `config.json`; null stands for the default, as there.

    Raises `UserError` naming the key when a size is missing or no number, the model is another architecture,
    or it uses what Aquila lacks.
    """
    kind = values.get("model_type")
    values = {**_MODEL_TYPES.get(str(kind), {}), **values}
    values = {key: value for key, value in values.items() if value is not None}
    if kind not in _MODEL_TYPES:
        raise UserError(
            f"{where}: model_type {values.get('model_type')!r} is not one of {', '.join(_MODEL_TYPES)}"
        )
    read = Reader(values, where)
    dim, heads = read.size("hidden_size"), read.size("num_attention_heads")
    if dim % heads and "head_dim" not in values:
        raise UserError(f"{where}: hidden_size {dim} is no multiple of num_attention_heads {heads}")
    refused = {
        "attention_bias": bool(values.get("attention_bias")),
        "mlp_bias": bool(values.get("mlp_bias")),
        "quantization_config": bool(values.get("quantization_config")),
        "hidden_act": values.get("hidden_act", "silu") not in ("silu", "swish"),  # two names of one function
        "sliding_window": _slides(values),
    }
    for key, is_refused in refused.items():
        if is_refused:
            shown = repr(values.get(key))
            raise UserError(f"{where}: {key} = {shown} has no counterpart in Aquila's architecture")
    ours = {
        "dim": dim,
        "n_layers": read.size("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": read.size("num_key_value_heads", heads),
        "head_dim": read.size("head_dim", dim // heads),
        "vocab_size": read.size("vocab_size"),
        "tied_embeddings": bool(values.get("tie_word_embeddings", False)),
        "hidden_dim": read.size("intermediate_size"),
        "norm_eps": read.number("rms_norm_eps", 1e-6),
        **rope_from_hf(read),
        "initializer_range": read.number("initializer_range", 0.02),
    }
    config = validate(ModelConfig, ours, where)
    for formula in _FEED_FORWARD_FORMULAS:  # the size by its formula, where one of Aquila's gives it
        if config.model_copy(update={"hidden_dim": None, **formula}).ffn_dim == config.ffn_dim:
            return config.model_copy(update={"hidden_dim": None, **formula})
    return config


def _slides(values: dict[str, Any]) -> bool:
    """Whether attention looks back less far than the context reaches."""
    window = values.get("sliding_window")
    reached = isinstance(window, int) and window >= values.get("max_position_embeddings", 2048)
    return bool(window) and not reached and bool(values.get("use_sliding_window", True))


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A `config.json` that plain transformers loads as `LlamaForCausalLM`; `dtype` as in "bfloat16".

    Raises `UserError` for heads that transformers refuses.
    """
    if config.dim % config.n_heads:
        raise UserError(f"transformers takes no Llama of {config.dim} dimensions and {config.n_heads} heads")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        **rope_to_hf(config),
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
    }
