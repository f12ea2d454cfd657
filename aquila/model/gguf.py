"""GGUF, the file of llama.cpp and of what stands on it (Ollama, LM Studio), written by the `gguf` package.

llama.cpp's "llama" architecture rotates interleaved pairs, as Aquila does: no matrix is reordered. Norms are
fp32 there, whatever the others' type.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from aquila.config import ModelConfig
from aquila.core.errors import UserError
from aquila.model.files import TensorInfo, as_bytes
from aquila.tokenizer import BytePairTokenizer, JsonTokenizer, SentencePieceTokenizer, Tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

_TOP = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
_LAYER = {
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "attention_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "Q8_0"}
_Q8_BLOCK = 32  # values of a row that share a scale
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # llama.cpp's kinds of tokens
INSTALL = "pip install gguf"


def name_of(released: str) -> str:
    """llama.cpp's name of a released parameter."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", released)
    return f"blk.{match[1]}.{_LAYER[match[2]]}" if match else _TOP[released]


def require_package() -> None:
    """Raises `UserError` where the `gguf` package is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"--to gguf needs the gguf package, which is not installed: {INSTALL}") from None


def write_gguf(
    path: Path,
    name: str,
    config: ModelConfig,
    infos: dict[str, TensorInfo],
    produce: Callable[[str], Tensor],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes `path`, one tensor in memory at a time; int8 in `infos` stands for Q8_0, 8 bits and a scale.

    `produce(released name)` gives a tensor of any dtype. Without a tokenizer the file takes and gives ids
    alone. Raises `UserError` for a tokenizer that the format cannot hold.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    dtypes = {parameter: _stored(info) for parameter, info in infos.items()}
    _describe(writer, name, config, dtypes["tok_embeddings.weight"])
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for parameter, info in infos.items():
        kind, size = _type(dtypes[parameter]), _bytes(info.shape, dtypes[parameter])
        rows = (*info.shape[:-1], size // torch.Size(info.shape[:-1]).numel())  # the last axis in bytes
        writer.add_tensor_info(name_of(parameter), rows, np.dtype(np.uint8), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for parameter in infos:
            writer.write_tensor_data(_values(produce(parameter), dtypes[parameter]))
        writer.flush()
    finally:
        writer.close()


def matrix_dtype(path: Path) -> torch.dtype:
    """In what a file that `write_gguf` made holds the output matrix; int8 for Q8_0."""
    from gguf import GGUFReader

    names = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    matrix = names.get("output.weight", names["token_embd.weight"])  # tied: there is the embedding alone
    return next(dtype for dtype, name in _TYPES.items() if name == matrix)


def _stored(info: TensorInfo) -> torch.dtype:
    if len(info.shape) == 1:
        return torch.float32
    if info.dtype == torch.int8 and info.shape[-1] % _Q8_BLOCK:
        return torch.bfloat16
    return info.dtype


def _type(dtype: torch.dtype) -> "GGMLQuantizationType":
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[_TYPES[dtype]]


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = torch.Size(shape).numel()
    return count // _Q8_BLOCK * (_Q8_BLOCK + 2) if dtype == torch.int8 else count * dtype.itemsize


def _values(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    if dtype != torch.int8:
        return np.frombuffer(as_bytes(tensor.to(dtype).contiguous()), np.uint8)
    from gguf.quants import quantize

    return quantize(tensor.float().contiguous().numpy(), _type(dtype))


def _describe(writer: "GGUFWriter", name: str, config: ModelConfig, dtype: torch.dtype) -> None:
    from gguf import LlamaFileType

    file_type = "ALL_F32" if dtype == torch.float32 else f"MOSTLY_{_TYPES[dtype]}"
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_quantization_version(2)  # of Q8_0's layout
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer | None, size: int) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    if tokenizer.vocab_size > size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {size}: they do not fit")
    if isinstance(tokenizer, JsonTokenizer):
        raise UserError("another model's tokenizer.json is not written into GGUF files here; take --to hf")
    # Ids without a token get a text that none else has: llama.cpp takes no two of the same.
    tokens, kinds = [f"[unused {i}]" for i in range(size)], [_UNUSED] * size
    if isinstance(tokenizer, BytePairTokenizer):
        vocab, merges = tokenizer.read_files()
        for token, i in vocab.items():
            tokens[i], kinds[i] = token, _NORMAL
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        pieces = tokenizer.pieces()
        tokens[: len(pieces)] = [piece.text for piece in pieces]
        kinds[: len(pieces)] = [piece.kind for piece in pieces]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([piece.score for piece in pieces] + [0.0] * (size - len(pieces)))
        writer.add_add_space_prefix(tokenizer.adds_first_space)
    for token, i in tokenizer.special_tokens.items():
        if token in tokens and tokens[i] != token:  # of the pieces that stay unused (`</s>`)
            tokens[tokens.index(token)] = f"[unused {tokens.index(token)}]"
        tokens[i], kinds[i] = token, _CONTROL
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(True)  # as `generate.py` begins a prompt
    writer.add_add_eos_token(False)
