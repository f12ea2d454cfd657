"""Loss, perplexity and bits per byte of a model on an indexed dataset or a text.

    python -m aquila.evaluate --model-dir DIR --data PREFIX [--json]
    torchrun --nproc-per-node N -m aquila.evaluate ...      the same numbers, shared out over N ranks

Every document stands alone: `[CLS]` is given, and each later token, `</s>` included, is predicted once
from what precedes it in its window. A document longer than the context is cut into windows that follow
one another; the first prediction of a window sees one token. The loss is the mean over all predicted
tokens, in nats; perplexity is its exponential; bits per byte is the whole loss in bits over the UTF-8 bytes
of the documents' text, which compares models of different tokenizers.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aquila.config.run import parse_split
from aquila.core.errors import UserError, run_command
from aquila.core.text_files import read_text, text_under
from aquila.data.documents import Documents as IndexedDocuments
from aquila.data.meta import check_dataset
from aquila.generation.locate import resolve_checkpoint
from aquila.tokenizer import Tokenizer, load_tokenizer

PARTS = ("train", "valid", "test")


class Documents(NamedTuple):
    """What is evaluated: `tokens(i)` int64 ids of a document, framed `[CLS] ... </s>`."""

    lengths: np.ndarray
    """int64 (documents,): tokens of each."""
    tokens: object
    """Callable: document number -> np.int64 array."""


@dataclass(frozen=True)
class Report:
    """The outcome; `loss` in nats a token."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    """Predicted tokens."""
    bytes: int
    documents: int
    seq_length: int
    seconds: float
    tokens_per_second: float
    ranks: int
    dtype: str
    model_dir: str
    data: str


def parser() -> argparse.ArgumentParser:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parse = argparse.ArgumentParser(
        prog="python -m aquila.evaluate",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--model-dir", required=True, metavar="DIR", help="a model folder or a run")
    parse.add_argument(
        "--data",
        required=True,
        metavar="PREFIX",
        help="an indexed dataset, a .jsonl (key text), or a text file",
    )
    parse.add_argument("--split", default="100", metavar="A,B,C", help="shares of documents, as in training")
    parse.add_argument("--part", default="train", choices=PARTS, help="which share (default: the first)")
    parse.add_argument("--seq-length", type=int, metavar="N", help="window (default: the model's context)")
    parse.add_argument("--limit", type=int, metavar="N", help="only the first N documents")
    parse.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="tokens computed at once")
    parse.add_argument("--device", default="auto", metavar="D", help="default: the best that is here")
    parse.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="auto: as stored"
    )
    parse.add_argument("--int8", action="store_true", help="round the matrices to int8 after loading")
    parse.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parse


def main() -> int:
    arguments = parser().parse_args()
    for name in ("seq_length", "limit", "batch_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more (got {value})")
    if arguments.data.endswith((".bin", ".idx")) and Path(f"{arguments.data[:-4]}.idx").is_file():
        arguments.data = arguments.data[:-4]  # a file of the dataset for its prefix
    model_dir = resolve_checkpoint(arguments.model_dir, Path.cwd())
    tokenizer = load_tokenizer(model_dir)
    documents = open_documents(arguments.data, tokenizer, arguments.split, arguments.part, arguments.limit)
    from aquila.backend import get_backend
    from aquila.generation.load import device_type, load

    device = device_type(arguments.device)
    number = arguments.device.partition(":")[2] or os.environ.get("LOCAL_RANK", "0")
    with ranks(device) as (rank, world_size):
        place = str(get_backend(device).set_device(int(number)))
        loaded = load(model_dir, device=place, dtype=arguments.dtype, int8=arguments.int8)
        check_ids(arguments.data, documents, tokenizer, loaded.model.config.vocab_size)
        report = evaluate(loaded.model, tokenizer, documents, arguments, rank, world_size)
    if rank == 0:
        show(report, arguments.json)
    return 0


def open_documents(data: str, tokenizer: Tokenizer, split: str, part: str, limit: int | None) -> Documents:
    """The documents of a dataset, a `.jsonl` or a text file, or a share of them.

    Raises `UserError` for what cannot be read and for an empty share.
    """
    whole = _indexed(data) if Path(f"{data}.idx").is_file() else _texts(Path(data), tokenizer)
    try:
        shares = parse_split(split)
    except ValueError as error:
        raise UserError(f"--split: {error}") from None
    count, at = len(whole.lengths), PARTS.index(part)
    first, stop = (round(sum(shares[:n]) * float(count)) for n in (at, at + 1))
    if limit is not None:
        stop = min(stop, first + limit)
    lengths = whole.lengths[first:stop]
    if not (lengths > 1).any():
        raise UserError(f"{data}: the {part} share of split {split} ({stop - first} documents) has no text")
    return Documents(lengths, lambda number: whole.tokens(first + number))


def _indexed(prefix: str) -> Documents:
    source = IndexedDocuments(prefix)
    lengths = source.index.lengths.astype(np.int64)
    return Documents(lengths, lambda number: source.read(number, 0).astype(np.int64))


def _texts(path: Path, tokenizer: Tokenizer) -> Documents:
    if not path.is_file():
        raise UserError(f"{path} is neither an indexed dataset ({path}.idx) nor a text file")
    text = read_text(path)
    texts = [text]
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        texts = [text_under(line, "text", f"{path}, line {at}") for at, line in lines if line.strip()]
    framed = [
        np.array([tokenizer.bos_id, *tokenizer.encode(one), tokenizer.eos_id], np.int64)
        for one in texts
        if one
    ]
    return Documents(np.array([len(ids) for ids in framed], np.int64), framed.__getitem__)


def check_ids(data: str, documents: Documents, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `UserError` when an indexed dataset is of another tokenizer or exceeds the vocabulary."""
    if Path(f"{data}.idx").is_file():
        note = check_dataset(data, tokenizer, vocab_size)
        if note:
            print(f"note: {note}", file=sys.stderr)


@contextlib.contextmanager
def ranks(device_type: str) -> Iterator[tuple[int, int]]:
    """(rank, world size); with a launcher around, a process group for as long as it is needed."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield 0, 1
        return
    import torch.distributed as dist

    from aquila.backend import get_backend

    dist.init_process_group(get_backend(device_type).COMMUNICATION)
    try:
        yield dist.get_rank(), world_size
    finally:
        dist.destroy_process_group()


def make_windows(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """int64 (windows, 3): document, first input token, number of predicted tokens; longest first."""
    found = [
        (document, start, min(seq_length, int(length) - 1 - start))
        for document, length in enumerate(lengths.tolist())
        for start in range(0, length - 1, seq_length)
    ]
    windows = np.array(found, np.int64).reshape(-1, 3)
    return windows[np.argsort(-windows[:, 2], kind="stable")]


def make_batches(windows: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Windows in batches of at most `batch_tokens` tokens, padding counted (one window at least)."""
    batches, start = [], 0
    while start < len(windows):
        size = max(1, batch_tokens // int(windows[start, 2]))
        batches.append(windows[start : start + size])
        start += size
    return batches


def evaluate(
    model, tokenizer: Tokenizer, documents: Documents, arguments, rank: int, world_size: int
) -> Report:
    """The report, the same on every rank.

    Batches are made as if there were one rank, each is computed by one, and their sums are added in
    their order: the number of ranks changes no digit.
    """
    import torch

    started = time.perf_counter()
    seq_length = arguments.seq_length or model.config.max_seq_len
    if seq_length > model.config.max_seq_len:
        raise UserError(f"--seq-length {seq_length} exceeds the model's context {model.config.max_seq_len}")
    windows = make_windows(documents.lengths, seq_length)
    batches = make_batches(windows, arguments.batch_tokens)
    sizes = byte_table(tokenizer)
    sums = torch.zeros(len(batches), 2, dtype=torch.float64)  # nats, bytes
    for number in range(rank, len(batches), world_size):
        sums[number, 0], sums[number, 1] = batch_loss(model, documents, batches[number], sizes)
        if rank == 0:
            progress(number, len(batches))
    if world_size > 1:
        import torch.distributed as dist

        device = model.tok_embeddings.weight.device
        shared = sums.to(device)
        dist.all_reduce(shared)
        sums = shared.cpu()
    nats, size = (math.fsum(column) for column in sums.T.tolist())
    tokens = int(windows[:, 2].sum())
    seconds = time.perf_counter() - started
    return Report(
        loss=nats / tokens,
        perplexity=math.exp(min(nats / tokens, 700.0)),
        bits_per_byte=nats / math.log(2) / max(size, 1),
        tokens=tokens,
        bytes=int(size),
        documents=int((documents.lengths > 1).sum()),
        seq_length=seq_length,
        seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 1),
        ranks=world_size,
        dtype=str(model.tok_embeddings.weight.dtype).removeprefix("torch.") + ", int8" * arguments.int8,
        model_dir=str(arguments.model_dir),
        data=str(arguments.data),
    )


def batch_loss(model, documents: Documents, windows: np.ndarray, sizes: np.ndarray) -> tuple[float, int]:
    """(loss of all predicted tokens in nats, their bytes) of one batch, padded on the right."""
    import torch

    longest = int(windows[:, 2].max())
    tokens, labels = (np.zeros((len(windows), longest), np.int64) for _ in range(2))
    mask = np.zeros((len(windows), longest), np.float32)
    size = 0
    for row, (document, start, count) in enumerate(windows.tolist()):
        ids = documents.tokens(document)[start : start + count + 1]
        tokens[row, :count], labels[row, :count], mask[row, :count] = ids[:-1], ids[1:], 1.0
        size += int(sizes[ids[1:]].sum())
    device = model.tok_embeddings.weight.device
    with torch.inference_mode():
        mean = model(*(torch.from_numpy(array).to(device) for array in (tokens, labels, mask)))
    return float(mean) * int(windows[:, 2].sum()), size


def byte_table(tokenizer: Tokenizer) -> np.ndarray:
    """int64 (vocabulary,): bytes of text that each id stands for; specials stand for none."""
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)], np.int64)
    sizes[list(tokenizer.special_tokens.values())] = 0
    return sizes


def progress(number: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if number + 1 >= total else ""
        print(f"\rbatch {number + 1}/{total}", end=end, file=sys.stderr, flush=True)


def show(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False))
        return
    print(f"{report.model_dir} on {report.data}")
    print(f"  loss           {report.loss:.6f} nats a token")
    print(f"  perplexity     {report.perplexity:.4f}")
    print(f"  bits per byte  {report.bits_per_byte:.6f}")
    print(f"  {report.tokens} tokens and {report.bytes} bytes of {report.documents} documents")
    rate = f"{report.tokens_per_second:.0f} tokens/s"
    print(f"  {report.seconds:.1f} s on {report.ranks} rank(s), {rate}, {report.dtype}")


if __name__ == "__main__":
    run_command(main)
