"""The mean of several checkpoints as a model folder, or their exponential moving average.

    python -m aquila.average CHECKPOINT... --output DIR [--ema DECAY] [--data PREFIX]
    python -m aquila.average RUN --last N --output DIR

Members are given oldest first: checkpoints, model folders, runs (their newest checkpoint); or one run, whose
last N checkpoints are meant. `--data` tells the loss of the average beside those of its members.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from aquila.convert import DTYPES
from aquila.core.checkpoints import FOLDER, MANIFEST, find_corruption, list_checkpoints
from aquila.core.errors import UserError, run_command
from aquila.core.files import temporary_name
from aquila.evaluate import check_ids, evaluate, open_documents
from aquila.generation.load import load
from aquila.generation.locate import resolve_checkpoint
from aquila.model.average import check_alike, ema_shares, write_average
from aquila.model.hf_tokenizer import copy_released, write_json
from aquila.tokenizer import has_tokenizer, load_tokenizer

RECORD = "average.json"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m aquila.average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("members", nargs="+", metavar="CHECKPOINT", help="oldest first")
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--last", type=int, metavar="N", help="of one run: its last N checkpoints")
    add(
        "--ema", type=float, metavar="DECAY", help="weights of a moving average, 0 < DECAY < 1; else the mean"
    )
    add("--dtype", choices=sorted(set(DTYPES) - {"q8_0"}), help="default: as the last member has it")
    add(
        "--data",
        metavar="PREFIX",
        help="an indexed dataset, a .jsonl or a text: evaluate members and average",
    )
    add("--split", default="100", metavar="A,B,C", help="shares of its documents, as in training")
    add(
        "--part", default="train", choices=("train", "valid", "test"), help="which share (default: the first)"
    )
    add("--limit", type=int, metavar="N", help="evaluate the first N documents alone")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    members = find_members(args.members, args.last)
    if args.ema is not None and not 0 < args.ema < 1:
        raise UserError(f"--ema {args.ema:g}: give a decay between 0 and 1, such as 0.5")
    if args.output.exists():
        raise UserError(f"{args.output} exists already: choose another --output, or remove it first")
    config = check_alike(members)
    if args.data and not has_tokenizer(members[-1]):
        raise UserError(f"--data needs a tokenizer, and {members[-1]} holds none")
    shares = ema_shares(len(members), args.ema) if args.ema else [1 / len(members)] * len(members)
    losses = [loss_of(member, args) for member in members] if args.data else [None] * len(members)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_name(args.output)
    unfinished.mkdir()
    try:
        write_average(members, shares, unfinished, dtype=DTYPES.get(args.dtype))
        write_json(unfinished / "config.json", config.to_dict())
        if has_tokenizer(members[-1]):
            copy_released(members[-1], unfinished)
        average = loss_of(unfinished, args) if args.data else None
        record: dict[str, Any] = {"ema": args.ema, "data": args.data, "loss": average, "members": [
            {"path": str(member), "share": share, "loss": loss}
            for member, share, loss in zip(members, shares, losses, strict=True)
        ]}  # fmt: skip
        write_json(unfinished / RECORD, record)
        os.replace(unfinished, args.output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    show(record, args.output)
    return 0


def find_members(given: list[str], last: int | None) -> list[Path]:
    """The folders to average. Raises `UserError` for fewer than two, a damaged one, or one given twice."""
    if last is not None:
        if len(given) != 1 or last < 2:
            raise UserError("--last N takes one run, and N of 2 or more")
        newest = resolve_checkpoint(given[0], Path.cwd())
        kept = list_checkpoints(newest.parent)
        if newest.parent.name != FOLDER or len(kept) < last:
            raise UserError(f"{given[0]} holds {len(kept)} checkpoints of a run, not {last}")
        members = kept[-last:]
    else:
        members = [resolve_checkpoint(name, Path.cwd()) for name in given]
    if len({member.resolve() for member in members}) < max(2, len(members)):
        raise UserError("an average needs two members or more, each given once")
    for member in members:
        if (member / MANIFEST).is_file() and (problem := find_corruption(member)):
            raise UserError(f"{member}: {problem}")
    return members


def loss_of(folder: Path, args: argparse.Namespace) -> float:
    """Nats a token on `--data`."""
    tokenizer = load_tokenizer(folder)
    documents = open_documents(args.data, tokenizer, args.split, args.part, args.limit)
    loaded = load(folder)
    check_ids(args.data, documents, tokenizer, loaded.model.config.vocab_size)
    options = argparse.Namespace(
        seq_length=None, batch_tokens=8192, int8=False, model_dir=folder, data=args.data
    )
    return evaluate(loaded.model, tokenizer, documents, options, 0, 1).loss


def show(record: dict[str, Any], output: Path) -> None:
    """The members and the average, with their losses where they are known."""
    rows = [(member["path"], f"{member['share']:.4f}", member["loss"]) for member in record["members"]]
    rows.append((str(output), "", record["loss"]))
    width = max(len(path) for path, _, _ in rows)
    for path, share, loss in rows:
        told = "" if loss is None else f"  loss {loss:.6f}"
        print(f"{path.ljust(width)}  {share.rjust(6)}{told}".rstrip())


if __name__ == "__main__":
    run_command(main)
