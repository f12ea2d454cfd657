"""Text to an indexed dataset: ours against `tokenizers` alone and against Megatron's way, in one run.

    python benchmarks/data_prep.py [--megabytes 54] [--workers 2] [--rounds 3]

- ours: `make_datasets` reads, tokenizes and writes; and the whole command, start-up included.
- tokenizers: `encode_batch_fast` on texts in memory, nothing read or written, start-up left out.
- megatron: a process pool that tokenizes line by line with the Hugging Face tokenizer, and one writer,
  megatron-core's `IndexedDatasetBuilder` (the way of Megatron-LM's tools/preprocess_data.py), start-up
  left out.

Contestants take turns in processes of their own; the best of `--rounds` counts. The ids of all are
compared. The last line is JSON: MB of UTF-8 text per second, the ratios, and the CPU seconds that each
spent on its process from start to end, which say what other work on the machine hides.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"


def texts_of(corpora: list[Path]) -> Iterator[str]:
    from aquila.data.prepare.blocks import cut
    from aquila.data.prepare.documents import Reading, read_documents
    from aquila.data.prepare.inputs import find_sources

    sources = find_sources([str(path) for path in corpora])
    for block in cut(sources, text_lines=False, columns=("text",)):
        yield from (found.texts[0] for found in read_documents(block, Reading())[0] if found.texts)


def write_input(path: Path, corpora: list[Path], megabytes: float) -> int:
    """JSONL of about so many MB of text: the corpora, over and over. Gives the bytes of text."""
    texts = list(texts_of(corpora))
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size += len(text.encode())
    return size


def hugging_face(model_dir: str):
    """The `tokenizers.Tokenizer` of a model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(f"{model_dir}/vocab.json", f"{model_dir}/merges.txt"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def ours(path: Path, model_dir: str, workers: int, output: Path) -> float:
    from aquila.data.prepare.pipeline import PrepareOptions, make_datasets
    from aquila.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    return make_datasets(PrepareOptions([str(path)], str(output), workers), tokenizer).seconds


def ours_command(path: Path, model_dir: str, workers: int, output: Path) -> float:
    words = [sys.executable, "-m", "data_tools.make_indexed_dataset", "--input", str(path)]
    words += ["--output-prefix", str(output), "--model-dir", model_dir, "--workers", str(workers)]
    started = time.perf_counter()
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def tokenizers(path: Path, model_dir: str, workers: int, output: Path) -> float:
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    tokenizer = hugging_face(model_dir)
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    tokenizer.encode_batch_fast(texts[:100])
    started = time.perf_counter()
    for start in range(0, len(texts), 4096):
        tokenizer.encode_batch_fast(texts[start : start + 4096])
    return time.perf_counter() - started


class Encoder:
    """A worker of Megatron's way."""

    @staticmethod
    def load(model_dir: str) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from transformers import PreTrainedTokenizerFast

        Encoder.tokenizer = PreTrainedTokenizerFast(tokenizer_object=hugging_face(model_dir))

    @staticmethod
    def encode(line: str) -> list[int]:
        return Encoder.tokenizer(json.loads(line)["text"])["input_ids"]


def megatron(path: Path, model_dir: str, workers: int, output: Path) -> float:
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from aquila.tokenizer import load_tokenizer

    ends = load_tokenizer(model_dir)
    with multiprocessing.Pool(workers, Encoder.load, (model_dir,)) as pool:
        pool.map(Encoder.encode, ['{"text": "warm"}'] * 64)
        started = time.perf_counter()
        builder = IndexedDatasetBuilder(f"{output}_text_document.bin", dtype=numpy.int32)
        with path.open(encoding="utf-8") as file:
            for ids in pool.imap(Encoder.encode, file, 32):
                builder.add_item(torch.tensor([ends.bos_id, *ids, ends.eos_id], dtype=torch.int32))
                builder.end_document()
        builder.finalize(f"{output}_text_document.idx")
        return time.perf_counter() - started


CONTESTANTS = {f.__name__: f for f in (ours, ours_command, tokenizers, megatron)}


def in_own_process(name: str, *arguments: object) -> tuple[float, float]:
    """(wall seconds that the contestant counts, CPU seconds of its whole process and children)."""
    words = [sys.executable, __file__, "--contestant", name, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    wall, cpu = done.stdout.split()[-2:]
    return float(wall), float(cpu)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=54, help="of text; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--corpus", type=Path, nargs="+", help="default: ../shared/data/corpus, else the demo"
    )
    parser.add_argument("--model-dir", help="default: ../shared/data/aquila-tokenizer, else aquila-tiny")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        corpora, model_dir = arguments.corpus, arguments.model_dir
        if corpora is None and SHARED.is_dir():
            corpora = [SHARED / "corpus"]
        elif corpora is None:
            from data_tools.make_demo_corpus import write_corpus

            corpora = [Path(folder) / "demo.jsonl"]
            write_corpus(corpora[0], 10_000, 2023)
        if model_dir is None:
            real = SHARED / "aquila-tokenizer"
            model_dir = str(real if real.is_dir() else ROOT / "checkpoints_in/aquila-tiny")
        path = Path(folder) / "input.jsonl"
        size = write_input(path, corpora, arguments.megabytes)
        print(
            f"{size / 1e6:.1f} MB of text, {arguments.workers} workers, tokenizer of {model_dir}", flush=True
        )
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
        for turn in range(arguments.rounds):
            for name, times in seconds.items():
                times.append(in_own_process(name, path, model_dir, arguments.workers, Path(folder) / name))
                print(f"round {turn + 1}  {name:14} {size / times[-1][0] / 1e6:6.1f} MB/s", flush=True)
        written = [
            (Path(folder) / f"{name}_text_document{kind}").read_bytes()
            for kind in (".bin", ".idx")
            for name in ("ours", "ours_command", "megatron")
        ]
        same = len(set(written[:3])) == 1 and len(set(written[3:])) == 1
        best = {name: min(times)[0] for name, times in seconds.items()}
        cpu = {name: round(min(cpu for _, cpu in times), 2) for name, times in seconds.items()}
        report(size, best, cpu, same)


def report(size: int, best: dict[str, float], cpu: dict[str, float], same: bool) -> None:
    rate = {name: round(size / seconds / 1e6, 2) for name, seconds in best.items()}
    result = {
        "megabytes_per_second": rate,
        "ours_over_tokenizers": round(best["tokenizers"] / best["ours"], 2),
        "ours_with_start_up_over_tokenizers": round(best["tokenizers"] / best["ours_command"], 2),
        "ours_over_megatron": round(best["megatron"] / best["ours"], 2),
        "cpu_seconds": cpu,
        "same_bytes_as_megatron": same,
        "text_bytes": size,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        name, path, model_dir, workers, output = sys.argv[2:]
        wall = CONTESTANTS[name](Path(path), model_dir, int(workers), Path(output))
        print(wall, sum(os.times()[:4]))
    else:
        main()
