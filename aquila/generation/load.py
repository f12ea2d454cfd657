"""Loads a model folder to talk to: weights, tokenizer, and a line that says what was loaded."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from aquila.backend import DEVICE_TYPES, detect, get_backend
from aquila.core.errors import UserError
from aquila.generation.int8 import quantize
from aquila.model import AquilaModel
from aquila.model.weights import Weights, load_config
from aquila.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    model: AquilaModel
    tokenizer: Tokenizer
    model_dir: Path
    description: str
    """One line for people: folder, size, dtype, device, seconds."""


def load(
    model_dir: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    int8: bool = False,
    threads: int | None = None,
) -> LoadedModel:
    """The model and tokenizer of `model_dir`.

    `device` auto is the best that this machine has; `dtype` auto is the stored one (fp16 becomes bf16 where
    the device lacks it); with `int8` the matrices are rounded to it. Raises `UserError` for a folder that
    does not load, or a tokenizer with more ids than the model.
    """
    started = time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    kind = device_type(device)
    backend = get_backend(kind)
    device = str(backend.set_device(int(device.partition(":")[2] or 0)))
    backend.prepare_generation()
    tokenizer = load_tokenizer(model_dir)
    config = load_config(model_dir)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{model_dir}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}; "
            "they are not of one kind: copy the tokenizer's files that the model was trained with"
        )
    chosen = _stored_dtype(model_dir, config, kind) if dtype == "auto" else DTYPES[dtype]
    model = AquilaModel.from_pretrained(model_dir, dtype=chosen, device=device)
    model.eval().requires_grad_(False)
    if int8:
        quantize(model)
    seconds = time.perf_counter() - started
    name = next(key for key, value in DTYPES.items() if value == chosen)
    name = f"int8 weights, {name}" if int8 else name
    description = (
        f"{model_dir}: {_size(config.parameter_count())} parameters, {name} on {device}, "
        f"context {config.max_seq_len} tokens, loaded in {seconds:.1f} s"
    )
    return LoadedModel(model, tokenizer, model_dir, description)


def device_type(device: str) -> str:
    """The type of `device` ("auto", "cpu", "cuda:1", ...). Raises `UserError` when it is not here."""
    if device == "auto":
        return detect()
    kind, _, number = device.partition(":")
    known = kind in DEVICE_TYPES and (number or "0").isdecimal()
    if not known or int(number or 0) >= get_backend(kind).device_count():
        raise UserError(
            f"device '{device}' is not here; this machine has {detect()} (--device auto finds it)"
        )
    return kind


def _stored_dtype(model_dir: Path, config, device: str) -> torch.dtype:
    stored = Weights(model_dir, config).info["tok_embeddings.weight"].dtype
    if stored == torch.float16 and "fp16" not in get_backend(device).supported_precisions():
        return torch.bfloat16
    return stored if stored in DTYPES.values() else torch.float32


def _size(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
