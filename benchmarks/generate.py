"""Generation side by side with transformers' `generate` and llama.cpp on the same weights, in one run.

    python benchmarks/generate.py [--batch 1 8] [--prompt 32 1024 4096] [--new 64] [--repeats 3] [--full-size]

A random model of about 110M parameters is exported to Hugging Face's format and to GGUF; all sides then run
greedily in the same dtype with the same threads, in turns, and the best of each counts: ours, ours in int8,
transformers, llama.cpp, llama.cpp in Q8_0. `prefill` is the time to the first token, `decode` the rate of all
later ones, `bound` the rate at which memory gives weights, keys and values. `--full-size` measures Aquila-7B
in bf16 (random weights, 14.6 GB) against the bandwidth at which this machine reads memory. The last line is
JSON.
"""

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Weights in huge pages, for both sides alike; torch reads this once, at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from aquila.config import ModelConfig  # noqa: E402
from aquila.core.errors import UserError  # noqa: E402
from aquila.generation.decode import Decoder  # noqa: E402
from aquila.generation.int8 import quantize  # noqa: E402
from aquila.generation.sampling import Sampling  # noqa: E402
from aquila.model import AquilaModel, llama_cpp, save_weights  # noqa: E402
from aquila.model.gguf import require_package  # noqa: E402

SMALL = ModelConfig(dim=768, n_layers=12, n_heads=12, vocab_size=16000, multiple_of=256, max_seq_len=8192)
AQUILA_7B = ModelConfig(
    dim=4096, n_layers=32, n_heads=32, vocab_size=100008, multiple_of=256, max_seq_len=2048
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def arguments() -> argparse.Namespace:
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parse.add_argument("--prompt", type=int, nargs="+", default=[32, 1024, 4096])
    parse.add_argument("--new", type=int, default=64)
    parse.add_argument("--repeats", type=int, default=3)
    parse.add_argument("--dtype", choices=DTYPES, default="bf16")
    parse.add_argument("--without", nargs="+", default=[], choices=["transformers", "llama.cpp"])
    parse.add_argument("--threads", type=int, default=torch.get_num_threads())
    parse.add_argument("--full-size", action="store_true", help="Aquila-7B against the memory's bandwidth")
    parse.add_argument("--layers", type=int, default=32, help="of the full-size model, where memory is short")
    return parse.parse_args()


def ours(model: AquilaModel, prompts: list[list[int]], new: int) -> tuple[float, float, list[list[int]]]:
    """(seconds to the first tokens, seconds for the others, new tokens)."""
    decoder = Decoder(model, len(prompts), max_length=len(prompts[0]) + new)
    sequences = [decoder.sequence(prompt, Sampling(new, 0.0)) for prompt in prompts]
    started = time.perf_counter()
    decoder.admit(sequences)
    first = time.perf_counter()
    while decoder.active:
        decoder.step()
    return first - started, time.perf_counter() - first, [sequence.new_tokens for sequence in sequences]


def theirs(model, prompts: list[list[int]], new: int) -> tuple[float, float, list[list[int]]]:
    """As `ours`; a criterion that stops nothing notes when the first token was there."""
    tokens = torch.tensor(prompts)
    times: list[float] = []

    def note(ids, scores, **_):
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=[note],
        )
    return times[0] - started, times[-1] - times[0], out[:, tokens.shape[1] :].tolist()


def in_llama_cpp(path: Path, threads: int, prompts: list[list[int]], new: int) -> tuple[float, float, list]:
    """As `ours`; loading the file is not counted."""
    length = len(prompts[0]) + new
    model = llama_cpp.LlamaCpp(path, length=length, rows=len(prompts), threads=threads)
    started = time.perf_counter()
    latest = model.logits(prompts).argmax(1)
    first = time.perf_counter()
    tokens = [latest]
    for _ in range(new - 1):
        latest = model.logits(latest[:, None].tolist()).argmax(1)
        tokens.append(latest)
    seconds = time.perf_counter() - first
    model.close()
    return first - started, seconds, [list(map(int, row)) for row in zip(*tokens, strict=True)]


def convert(source: Path, target: Path, *options: str) -> Path:
    """The target that `aquila.convert` wrote."""
    command = [sys.executable, "-m", "aquila.convert", "--input", source, "--output", target, *options]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, capture_output=True)
    return target


def contenders(model: AquilaModel, folder: Path, options: argparse.Namespace) -> dict[str, Callable]:
    """Every side by its name: what takes prompts and a number of new tokens, as `ours` does."""
    small = AquilaModel(SMALL, dtype=DTYPES[options.dtype], seed=1).requires_grad_(False)
    quantize(small)
    sides = {"ours": partial(ours, model), "int8": partial(ours, small)}
    save_weights(model, folder / "aquila")
    (folder / "aquila" / "config.json").write_text(model.config.model_dump_json(exclude_defaults=True))
    if "transformers" not in options.without:
        other = in_transformers(
            convert(folder / "aquila", folder / "hf", "--to", "hf"), DTYPES[options.dtype]
        )
        sides["transformers"] = partial(theirs, other)
    if "llama.cpp" not in options.without:
        try:
            require_package()
            llama_cpp.library()
        except UserError as error:
            print(f"llama.cpp is left out: {error}")
            return sides
        for side, more in (("llama.cpp", []), ("q8_0", ["--dtype", "q8_0"])):
            file = convert(folder / "aquila", folder / f"{side}.gguf", "--to", "gguf", *more)
            sides[side] = partial(in_llama_cpp, file, options.threads)
    return sides


def in_transformers(folder: Path, dtype: torch.dtype):
    """The folder's model, its messages off."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def bandwidth() -> float:
    """Bytes a second at which all threads together read memory: the best of ten sums over 1 GiB."""
    block = torch.ones(2**28, dtype=torch.float32)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - started))
    return best


def bytes_a_token(config: ModelConfig, itemsize: float) -> float:
    """Weights that one step reads: all but the embedding, of which it reads a row."""
    return (config.parameter_count() - config.vocab_size * config.dim) * itemsize


def bound(speed: float, batch: int, places: float, itemsize: float, cache_itemsize: int) -> float:
    """Tokens a second when memory gives what a step reads: the weights once, each row's keys and values."""
    cache = 2 * SMALL.n_layers * SMALL.kv_heads * SMALL.head_dim * cache_itemsize * places
    return batch * speed / (bytes_a_token(SMALL, itemsize) + batch * cache)


def ratios(case: dict) -> dict[str, float]:
    """Ours over each contender (above 1: ours is faster), and our share of the bound."""
    rate, prefill = case["decode_tokens_s"], case["prefill_s"]
    found = {"of bound": rate["ours"] / case["bound_tokens_s"]}
    for side in ("transformers", "llama.cpp"):
        if side in rate:
            found[f"decode / {side}"] = rate["ours"] / rate[side]
            found[f"prefill / {side}"] = prefill[side] / prefill["ours"]
    if "q8_0" in rate:
        found["int8 / q8_0"] = rate["int8"] / rate["q8_0"]
    return found


def compare(options: argparse.Namespace) -> dict:
    """Rates, times and ratios of all sides."""
    dtype = DTYPES[options.dtype]
    model = AquilaModel(SMALL, dtype=dtype, seed=1).requires_grad_(False)
    results = {"dtype": options.dtype, "threads": options.threads, "cases": []}
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sides = contenders(model, Path(folder), options)
        results["bandwidth_gb_s"] = (speed := bandwidth()) / 1e9
        print(f"{SMALL.parameter_count() / 1e6:.0f}M parameters, {options.dtype}, {options.threads} threads")
        print(f"memory {speed / 1e9:.1f} GB/s\n")
        for batch, length in itertools.product(options.batch, options.prompt):
            prompts = torch.randint(0, SMALL.vocab_size, (batch, length), generator=generator).tolist()
            runs = {side: [] for side in sides}
            for _ in range(options.repeats):  # in turns, so that a busy moment hits all sides
                for side, run in sides.items():
                    runs[side].append(run(prompts, options.new)[:2])
            places = length + options.new / 2
            case = {
                "batch": batch,
                "prompt": length,
                "prefill_s": {side: min(run[0] for run in found) for side, found in runs.items()},
                "decode_tokens_s": {
                    side: batch * (options.new - 1) / min(run[1] for run in found)
                    for side, found in runs.items()
                },
                "bound_tokens_s": bound(speed, batch, places, dtype.itemsize, dtype.itemsize),
                "int8_bound_tokens_s": bound(speed, batch, places, 1, dtype.itemsize),
            }
            case["ratios"] = ratios(case)
            results["cases"].append(case)
            show(case)
    return results


def show(case: dict) -> None:
    """One case as lines."""
    print(f"batch {case['batch']}, prompt {case['prompt']}: bound {case['bound_tokens_s']:.0f} tokens/s")
    for side, rate in case["decode_tokens_s"].items():
        print(f"  {side:12}  prefill {case['prefill_s'][side]:8.3f} s   decode {rate:8.1f} tokens/s")
    print("  " + ", ".join(f"{name} {value:.2f}" for name, value in case["ratios"].items()), flush=True)


def full_size(options: argparse.Namespace) -> dict:
    """Aquila-7B's decode rate as a share of what the memory's bandwidth allows."""
    config = AQUILA_7B.model_copy(update={"n_layers": options.layers})
    speed = bandwidth()
    model = AquilaModel(config, device="meta", dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    block = torch.randn(1 << 20).mul_(config.initializer_range).bfloat16()
    with torch.no_grad():
        for parameter in model.requires_grad_(False).parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                part = flat[start : start + block.numel()]
                part.copy_(block[: part.numel()])
    prompt = list(range(1, 33))
    prefill, seconds, _ = ours(model, [prompt], options.new)
    rate = (options.new - 1) / seconds
    limit = speed / bytes_a_token(config, 2)
    size = config.parameter_count() / 1e9
    print(f"{size:.2f}B parameters, bf16: {rate:.2f} tokens/s, prefill {prefill:.2f} s")
    print(f"memory {speed / 1e9:.1f} GB/s allows {limit:.2f} tokens/s: {100 * rate / limit:.0f} %")
    return {"layers": options.layers, "tokens_s": rate, "limit_tokens_s": limit, "share": rate / limit}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    results = full_size(options) if options.full_size else compare(options)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
