"""Shows which documents of which corpus a training step consumed: what one wants when the loss jumps."""

import argparse
import json
from pathlib import Path

from aquila.core.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_tools.show_batch", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, checkpoints_out/EXP/VERSION")
    parser.add_argument("--step", type=int, required=True, help="training step, counted from 1")
    parser.add_argument(
        "--model-dir", metavar="DIR", help="decode the beginning of each sample with its tokenizer"
    )
    parser.add_argument("--characters", type=int, default=200, help="how much of it; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="a JSON object for each sample")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    samples = samples_of_step(arguments.run / "metrics.jsonl", arguments.step)
    from aquila.data.loss_mask import marked
    from aquila.data.order import open_order
    from aquila.tokenizer import load_tokenizer

    stream = open_order(arguments.run)
    tokenizer = load_tokenizer(arguments.model_dir) if arguments.model_dir else None
    if not arguments.json:
        print(f"step {arguments.step}: samples {samples.start:,} to {samples.stop - 1:,}")
    for k in samples:
        sample = stream[k]
        found = sample.provenance
        record = {
            "sample": k,
            "corpus": found.corpus,
            "epoch": found.epoch,
            "sample_of_corpus": found.sample,
            "documents": list(found.document_ids),
            "first_document_from_token": found.first_offset,
        }
        counted = None if sample.mask is None else sample.mask.astype(bool)
        if counted is not None:
            record["counted_tokens"] = int(counted[1:].sum())
        if tokenizer:
            record["text"] = marked(sample.tokens.tolist(), counted, tokenizer)[: arguments.characters]
        print(json.dumps(record, ensure_ascii=False) if arguments.json else _lines(record))
    return 0


def _lines(record: dict) -> str:
    documents = ", ".join(map(str, record["documents"]))
    lines = [
        f"sample {record['sample']:,}: {record['corpus']}, epoch {record['epoch']}, its sample "
        f"{record['sample_of_corpus']:,}: documents {documents}; the first from token "
        f"{record['first_document_from_token']}"
        + (f"; {record['counted_tokens']} labels count in the loss" if "counted_tokens" in record else "")
    ]
    return "\n".join(lines + ([f"    {record['text']!r}"] if "text" in record else []))


def samples_of_step(metrics: Path, step: int) -> range:
    """Samples consumed by `step`, from the logged steps around it, between which the batch is constant.

    Raises `UserError` for a run without logged steps and for a step that it has not reached, or that lies
    before the checkpoint of another run that it went on from.
    """
    from aquila.training.metrics import read_metrics

    begin, records = _beginning(metrics.parent / "history.jsonl")
    if step <= begin:
        raise UserError(f"--step {step}: the run went on from step {begin} of another one; see history.jsonl")
    for record in read_metrics(metrics):
        if type(record.get("consumed_samples")) is int:
            records[record["step"]] = record["consumed_samples"]
    last = max(records)
    if last == begin:
        raise UserError(f"{metrics} holds no logged step: is {metrics.parent} a run folder?")
    if not 1 <= step <= last:
        raise UserError(f"--step {step}: the run has logged steps {begin + 1} to {last}")
    before = max(s for s in records if s < step)
    after = min(s for s in records if s >= step)
    batch = (records[after] - records[before]) // (after - before)
    start = records[before] + batch * (step - 1 - before)
    return range(start, start + batch)


def _beginning(history: Path) -> tuple[int, dict[int, int]]:
    """The step from which the run's first start went on, and the samples consumed before each start."""
    from aquila.core.jsonl import objects

    starts = objects(history.read_bytes()) if history.is_file() else []
    starts = [s for s in starts if all(type(s.get(key)) is int for key in ("step", "consumed_samples"))]
    if not starts:
        return 0, {0: 0}
    return starts[0]["step"], {start["step"]: start["consumed_samples"] for start in starts}


if __name__ == "__main__":
    run_command(main)
