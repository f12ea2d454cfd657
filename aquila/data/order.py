"""`data_order.json` of a run: which samples it consumes, through every change of the blend's weights.

The file holds what decides the order (split, sequence length, seed, size of each corpus) and the
segments of the run, each a stretch at fixed weights. A corpus always goes on from what the run has
consumed of it: changed weights neither repeat nor skip a sample.
"""

import json
import os
from pathlib import Path
from typing import Any

from aquila.core.errors import UserError
from aquila.core.text_files import read_json
from aquila.data.blend import Segment
from aquila.data.indexed import SampleStream, open_corpora

FILE = "data_order.json"


def continue_order(run_dir: str | Path, stream: SampleStream, consumed_samples: int) -> list[str]:
    """Lets `stream` go on where the run stands; gives lines that tell the user of any change.

    Call it on every rank after `open_corpora`, before the first batch; then `record_order` on one rank.
    A run at its start, or one without the file, begins with the stream's own weights.
    Raises `UserError` where split, sequence length, seed or a dataset's content have changed: the
    consumed samples would then be other ones.
    """
    path = Path(run_dir) / FILE
    if consumed_samples == 0 or not path.is_file():
        return []
    recorded = read_json(path)
    _check_same(path, recorded, stream)
    segments = [s for s in _segments(path, recorded) if s.start < consumed_samples]
    now = stream.weights
    stream.follow(segments)
    last = segments[-1]
    if _same_weights(last.weights, now):
        return []
    consumed = stream.consumed(consumed_samples)
    stream.follow([*segments, Segment(consumed_samples, now, consumed)])
    return [f"the blend changes at sample {consumed_samples:,}", *_changes(stream, last.weights, consumed)]


def record_order(run_dir: str | Path, stream: SampleStream) -> None:
    """Replaces `data_order.json` with the order that `stream` follows."""
    path = Path(run_dir) / FILE
    content = _identity(stream) | {"segments": [segment.to_json() for segment in stream.segments]}
    unfinished = path.with_name(f"{FILE}.tmp-{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def open_order(run_dir: str | Path) -> SampleStream:
    """The training stream of a run as its `data_order.json` tells it, for looking things up.

    Raises `UserError` for a folder that is no run and for datasets that have changed since.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: is {run_dir} a run folder, checkpoints_out/EXP/VERSION?")
    recorded = read_json(path)
    segments = _segments(path, recorded)
    names = list(dict.fromkeys(name for segment in segments for name in segment.weights))
    stream = open_corpora(names, recorded["split"], recorded["seq_length"], recorded["seed"]).train
    _check_same(path, recorded, stream)
    stream.follow(segments)
    return stream


def _identity(stream: SampleStream) -> dict[str, Any]:
    sizes = {corpus.prefix: corpus.samples_per_epoch for corpus in stream.corpora}
    return stream.identity | {"samples_per_epoch": sizes}


def _check_same(path: Path, recorded: dict[str, Any], stream: SampleStream) -> None:
    here = _identity(stream)
    for key in ("split", "seq_length", "seed"):
        if recorded.get(key) != here[key]:
            raise UserError(
                f"{path}: the run was begun with {key} {recorded.get(key)}, now it is {here[key]}; its "
                f"samples would be others. Put {key} back, or begin a new run from these weights"
            )
    for name, size in here["samples_per_epoch"].items():
        before = recorded["samples_per_epoch"].get(name, size)
        if before != size:
            raise UserError(
                f"{path}: dataset {name} held {before:,} samples when the run began, now {size:,}; its "
                "order is another one. Put the dataset back, or give the new one another name"
            )


def _segments(path: Path, recorded: dict[str, Any]) -> list[Segment]:
    try:
        return [Segment(**segment) for segment in recorded["segments"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def _same_weights(before: dict[str, float], now: dict[str, float]) -> bool:
    return list(before) == list(now) and all(abs(before[name] - now[name]) < 1e-12 for name in now)


def _changes(stream: SampleStream, before: dict[str, float], consumed: dict[str, int]) -> list[str]:
    lines = []
    for corpus in stream.corpora:
        name, taken = corpus.prefix, consumed.get(corpus.prefix, 0)
        was = f"weight {before[name]:.4g} -> " if name in before else "new, weight "
        lines.append(
            f"  {name}: {was}{stream.weights[name]:.4g}, goes on at its sample {taken:,} "
            f"(epoch {taken / corpus.samples_per_epoch:.2f})"
        )
    gone = [
        f"  {name}: left out after {consumed[name]:,} samples"
        for name in before
        if name not in stream.weights
    ]
    return lines + gone
