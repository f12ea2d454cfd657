"""Weights and tokenizer of a run checkpoint, of Aquila's or of Hugging Face's format, any into any.

    python -m aquila.convert --input DIR --output DIR --to aquila|hf|gguf [--dtype D] [--set K=V] [--verify]

Streams: one parameter at a time is in memory. Without `--dtype` every value keeps its bits. `--to gguf` makes
one file, for llama.cpp: `--output NAME.gguf`, or a folder that gets `model.gguf`. `--set` changes keys of
config.json on the way, such as `max_seq_len` and `rope_scaling` for a longer context.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from aquila.config import ModelConfig
from aquila.config.strict import parse_yaml, validate
from aquila.core.errors import UserError, run_command
from aquila.core.files import temporary_name
from aquila.core.text_files import read_json
from aquila.generation.decode import Decoder
from aquila.generation.locate import resolve_checkpoint
from aquila.generation.sampling import Sampling
from aquila.model import AquilaModel, gguf, hf
from aquila.model.files import TensorInfo, write_torch
from aquila.model.hf_tokenizer import RELEASED_FILES, copy_released, write_hf, write_json
from aquila.model.llama_cpp import LlamaCpp, library
from aquila.model.weights import Weights, check_names, load_config, write_sharded
from aquila.tokenizer import has_tokenizer, load_tokenizer

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "q8_0": torch.int8,  # GGUF's
}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15, torch.int8: 0.5}
"""Largest difference of logits that `--verify` lets pass, by the dtype in which the models run."""
GGUF_FILE = "model.gguf"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = _parser().parse_args(arguments)
    source, output = resolve_checkpoint(str(args.input), Path.cwd()), args.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: choose another --output, or remove it first")
    dtype, changes = DTYPES.get(args.dtype), _changes(args.set)
    _check(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_name(output)
    unfinished.mkdir()
    try:
        convert(source, unfinished, args.to, dtype, int(args.max_shard_gb * 1e9), changes)
        if output.exists():
            output.rmdir()
        os.replace(unfinished / GGUF_FILE if output.suffix == ".gguf" else unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{source} -> {output} ({args.to})")
    if not args.verify:
        return 0
    result = output / GGUF_FILE if args.to == "gguf" and output.is_dir() else output
    return verify_tokens(source, result) or verify(source, result, changes)


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for what cannot be done, before anything is written."""
    if args.to != "gguf":
        if args.dtype == "q8_0" or args.output.suffix == ".gguf":
            raise UserError(f"--dtype q8_0 and an --output of .gguf need --to gguf, not --to {args.to}")
        return
    gguf.require_package()
    if args.verify:
        library()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m aquila.convert", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--input", type=Path, required=True, help="a model folder, run or checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="a new folder, or with --to gguf a file")
    parser.add_argument("--to", choices=("aquila", "hf", "gguf"), required=True)
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as stored")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest file of --to hf")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value",
        help="another value of a key of Aquila's config.json, in YAML; may be given several times",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="run both models and compare what they give")
    return parser


def _changes(texts: list[str]) -> dict[str, Any]:
    changes = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(f"--set {text}: give key=value, such as --set max_seq_len=8192")
        changes[key] = parse_yaml(value, f"--set {text}")
    return changes


def _changed(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    return validate(ModelConfig, {**config.model_dump(), **changes}, "--set") if changes else config


def convert(
    source: Path,
    target: Path,
    to: str,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    changes: dict[str, Any] | None = None,
) -> None:
    """Fills the folder `target`; changes: other values of keys of `ModelConfig`.

    Raises `UserError` when the source is incomplete or inconsistent.
    """
    config = load_config(source)
    weights = Weights(source, config)
    config = _changed(config, changes or {})
    if to == "gguf" and config.rope_scaling:
        raise UserError(f"{source}: rope_scaling is not written into GGUF files here; take --to hf")
    shapes = {name: tuple(p.shape) for name, p in AquilaModel(config, device="meta").named_parameters()}
    check_names(shapes, weights.found(config), str(source))
    infos = {name: TensorInfo(shape, dtype or weights.info[name].dtype) for name, shape in shapes.items()}

    def produce(name: str) -> Tensor:
        return weights.read(name).to(infos[name].dtype)

    tokenizer = copy_released(source, target) if has_tokenizer(source) else None
    if tokenizer is None:
        print(f"note: {source} holds no tokenizer: weights and configuration alone", file=sys.stderr)
    if to == "gguf":
        gguf.write_gguf(target / GGUF_FILE, source.name, config, infos, weights.read, tokenizer)
        for name in RELEASED_FILES:  # they are in the file
            (target / name).unlink(missing_ok=True)
        return
    if to == "aquila":
        write_json(target / "config.json", config.to_dict())
        write_torch(target / "pytorch_model.bin", infos, produce)
        return
    ids = {}
    if tokenizer is not None:
        write_hf(tokenizer, source, target, config.max_seq_len)
        ids = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_id") for mark in ("bos", "eos", "pad")}
    stored = str(infos["tok_embeddings.weight"].dtype).removeprefix("torch.")
    write_json(target / "config.json", {**hf.config_to_hf(config, stored), **ids})
    if ids:
        write_json(target / "generation_config.json", ids)
    _write_hf_weights(config, target, infos, produce, max_shard_bytes)


def _write_hf_weights(
    config: ModelConfig,
    target: Path,
    infos: dict[str, TensorInfo],
    produce: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    released = {hf.from_released(name): name for name in infos}
    heads = hf.permuted(config)

    def permuted(their_name: str) -> Tensor:
        name = released[their_name]
        tensor = produce(name)
        count = heads.get(hf.short(name))
        return tensor if count is None else hf.permute(tensor, count)

    theirs = {their_name: infos[name] for their_name, name in released.items()}
    write_sharded(target, theirs, permuted, max_shard_bytes)


# ---- verify ----------------------------------------------------------------------------------------------


_TEXTS = (
    "Hello, world!  two spaces", " x", "\tif (a <= 10):\n\n    return '½' ", "[CLS] </s> <|endoftext|> <s>",
    "将进酒，杯莫停。 ﬁ 🙂 é", "",
)  # fmt: skip


def verify_tokens(source: Path, output: Path) -> int:
    """Compares token ids, bos, eos and pad of a new Hugging Face folder; 1 where one differs."""
    if output.suffix == ".gguf" or not has_tokenizer(source):
        return 0
    if not (output / "tokenizer_config.json").is_file():
        theirs, by = load_tokenizer(output), "aquila"
        ids = {mark: getattr(theirs, f"{mark}_id") for mark in ("bos", "eos", "pad")}
        encode = theirs.encode
    else:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            print("verify: the tokenizer is not checked: run `pip install transformers`", file=sys.stderr)
            return 0
        their = AutoTokenizer.from_pretrained(output)
        by = "transformers"
        ids = {mark: getattr(their, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}

        def encode(text: str) -> list[int]:
            return their.encode(text, add_special_tokens=False, split_special_tokens=True)

    with tempfile.TemporaryDirectory() as folder:  # the source may be in Hugging Face's files
        ours = copy_released(source, Path(folder))
        wrong = [f"{text!r}" for text in _TEXTS if encode(text) != ours.encode(text)]
        for mark, index in ids.items():
            if index is not None and index != getattr(ours, f"{mark}_id"):
                wrong.append(f"{mark} is {index}, not {getattr(ours, f'{mark}_id')}")
    if wrong:
        print(f"error: {by} reads {output} with other token ids: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    print(f"verify: {by} gives the same ids for {len(_TEXTS)} texts, and for bos, eos and pad")
    return 0


def verify(source: Path, output: Path, changes: dict[str, Any] | None = None) -> int:
    """Runs both models on the same random tokens; 1 when their logits differ by too much.

    Each Hugging Face folder runs in transformers where that is installed, a GGUF file in llama.cpp, one model
    after the other. The source runs with `changes`.
    """
    config = _changed(load_config(source), changes or {})
    dtype = torch.float32 if _fits_in_fp32(config) else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, min(64, config.max_seq_len)), generator=generator)
    in_llama_cpp = output.suffix == ".gguf"
    if in_llama_cpp:
        tokens = _continued(source, tokens[:, : tokens.shape[1] // 2 - 1], dtype)
    (first, by_first), (second, by_second) = (
        _logits(folder, tokens, dtype, keys) for folder, keys in ((source, changes), (output, None))
    )
    difference = (first - second).abs().max().item()
    computed = gguf.matrix_dtype(output) if in_llama_cpp else dtype
    limit = TOLERANCES[computed] * max(1.0, first.abs().max().item() / 10)
    print(f"verify: {by_first} against {by_second} on {tokens.numel()} tokens in {computed}:")
    if in_llama_cpp:
        same = (first.argmax(-1) == second.argmax(-1))[:, tokens.shape[1] // 2 - 1 : -1]
        print(f"{int(same.sum())} of {same.numel()} greedy tokens are equal")
    print(f"largest difference of a logit {difference:.3g} (limit {limit:.3g})")
    if difference > limit:
        print(f"error: {output} does not compute what {source} does; do not use it", file=sys.stderr)
        return 1
    return 0


def _continued(folder: Path, prompts: Tensor, dtype: torch.dtype) -> Tensor:
    """The prompts (B, S) with S greedy tokens behind them."""
    decoder = Decoder(AquilaModel.from_pretrained(folder, dtype=dtype), len(prompts))
    sequences = [decoder.sequence(prompt, Sampling(prompts.shape[1], 0.0)) for prompt in prompts.tolist()]
    decoder.admit(sequences)
    while decoder.active:
        decoder.step()
    return torch.cat((prompts, torch.tensor([sequence.new_tokens for sequence in sequences])), dim=1)


def _fits_in_fp32(config: ModelConfig) -> bool:
    return 4.5 * config.parameter_count() < psutil.virtual_memory().available


@torch.no_grad()
def _logits(
    folder: Path, tokens: Tensor, dtype: torch.dtype, changes: dict[str, Any] | None
) -> tuple[Tensor, str]:
    """Logits in fp32, and what computed them; ourselves, where `changes` are asked for."""
    if folder.suffix == ".gguf":
        model = LlamaCpp(folder, length=tokens.shape[1], threads=torch.get_num_threads(), exact=True)
        rows = []
        for row in tokens.tolist():
            model.clear()
            rows.append(torch.from_numpy(model.logits([row], every=True)))
        model.close()
        return torch.stack(rows), "llama.cpp"
    if not changes and hf.is_hf_config(read_json(folder / "config.json")):
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            pass
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            return model(tokens).logits.float(), "transformers"
    model = AquilaModel.from_pretrained(folder, dtype=dtype, **(changes or {}))
    return model(tokens).float(), "aquila"


if __name__ == "__main__":
    run_command(main)
