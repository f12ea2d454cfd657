"""`data_order.json` of a run and of its checkpoints: which samples it consumes, through every change of the
blend's weights. A checkpoint's own file is what counts: the samples before it are those that it has seen.

The file holds what decides the order (split, sequence length, seed, size of each corpus) and the
segments of the run, each a stretch at fixed weights. A corpus always goes on from what the run has
consumed of it: changed weights neither repeat nor skip a sample.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aquila.config.run import parse_split
from aquila.core.errors import UserError
from aquila.core.text_files import read_json
from aquila.data.blend import Segment
from aquila.data.indexed import SampleStream, open_corpora

FILE = "data_order.json"


def order_files(run_dir: Path, checkpoint: Path | None) -> list[Path]:
    """Where the order up to `checkpoint` may stand: in itself, in the run that wrote it, in this run."""
    own = [checkpoint / FILE, checkpoint.resolve().parents[1] / FILE] if checkpoint else []
    return list(dict.fromkeys([*own, run_dir / FILE]))


def continue_order(files: Sequence[Path], stream: SampleStream, consumed_samples: int) -> list[str]:
    """Lets `stream` go on where the run stands; gives lines that tell the user of any change.

    files: of `order_files`; the first that is there and whole counts. Call it on every rank after
    `open_corpora`, before the first batch; then keep `order_text` on one rank. A run at its start begins
    with the stream's own weights. So does one without any such file, and a warning says what that means.
    Raises `UserError` where split, sequence length, seed or a dataset's content have changed: the
    consumed samples would then be other ones.
    """
    if consumed_samples == 0:
        return []
    path, recorded, notes = _first_whole(files)
    if recorded is None:
        return [*notes, _rebuilt(consumed_samples)]
    _check_same(path, recorded, stream)
    segments = [s for s in _segments(path, recorded) if s.start < consumed_samples]
    now = stream.weights
    stream.follow(segments)
    last = segments[-1]
    if _same_weights(last.weights, now):
        return notes
    consumed = stream.consumed(consumed_samples)
    stream.follow([*segments, Segment(consumed_samples, now, consumed)])
    return [
        *notes,
        f"the blend changes at sample {consumed_samples:,}",
        *_changes(stream, last.weights, consumed),
    ]


def order_text(stream: SampleStream) -> str:
    """The content of `data_order.json` for the order that `stream` follows."""
    content = _identity(stream) | {"segments": [segment.to_json() for segment in stream.segments]}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def open_order(run_dir: str | Path) -> SampleStream:
    """The training stream of a run as its `data_order.json` tells it, for looking things up.

    Raises `UserError` for a folder that is no run and for datasets that have changed since.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: is {run_dir} a run folder, checkpoints_out/EXP/VERSION?")
    recorded = _read(path)
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


def _first_whole(files: Sequence[Path]) -> tuple[Path, dict[str, Any] | None, list[str]]:
    """The first file that is there and whole, its content, and a warning for each damaged one before it."""
    notes: list[str] = []
    for path in files:
        if path.is_file():
            try:
                return path, _read(path), notes
            except UserError as error:
                notes.append(f"warning: the record of the data's order is not used: {error}")
    return files[-1], None, notes


def _rebuilt(consumed_samples: int) -> str:
    return (
        f"warning: no record tells in which order the {consumed_samples:,} consumed samples came ({FILE}): "
        "they are taken to be those of today's seed, split and weights. If these have changed since, some "
        "samples will be seen twice and some not at all"
    )


def _read(path: Path) -> dict[str, Any]:
    """The file's content, of the right types. Raises `UserError` when it is damaged."""
    recorded = read_json(path)
    try:
        counts = [recorded["seq_length"], recorded["seed"], *recorded["samples_per_epoch"].values()]
        starts = []
        for segment in recorded["segments"]:
            starts.append(segment["start"])
            counts += [segment["start"], *segment["consumed"].values()]
            weights = list(segment["weights"].values())
            if not weights or not all(type(w) in (int, float) and 0 < w < float("inf") for w in weights):
                raise ValueError("a weight is no number above 0")
        parse_split(recorded["split"])
        if not all(type(c) is int and c >= 0 for c in counts):
            raise ValueError("a count is no whole number")
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError("its segments do not follow one another from sample 0")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    return recorded


def _segments(path: Path, recorded: dict[str, Any]) -> list[Segment]:
    try:
        return [Segment(**segment) for segment in recorded["segments"]]
    except TypeError as error:
        raise UserError(f"{path}: damaged ({error})") from None


def _same_weights(before: dict[str, float], now: dict[str, float]) -> bool:
    return list(before) == list(now) and all(abs(before[name] - now[name]) < 1e-12 for name in now)


def _changes(stream: SampleStream, before: dict[str, float], consumed: dict[str, int]) -> list[str]:
    lines = []
    for corpus in (corpus for corpus in stream.corpora if corpus.prefix in stream.weights):
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
