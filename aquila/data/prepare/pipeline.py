"""The whole way from text files to indexed datasets."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from aquila.core.errors import UserError
from aquila.core.files import sha256
from aquila.data.loss_mask import mask_prefix
from aquila.data.meta import make_meta, tokenizer_facts
from aquila.data.prepare.assemble import DatasetWriter
from aquila.data.prepare.blocks import BLOCK_BYTES, Block, cut
from aquila.data.prepare.documents import ReaderOptions
from aquila.data.prepare.encode import EncodedBlock, Encoder
from aquila.data.prepare.inputs import Source, find_sources
from aquila.data.prepare.pool import run_tasks
from aquila.data.prepare.progress import Progress
from aquila.tokenizer import Tokenizer

_FORMAT = 1
_AHEAD = 4
"""Blocks under way for each worker, at most: bounds memory."""


@dataclass(frozen=True)
class PrepareOptions:
    """What is to be made."""

    inputs: Sequence[str]
    output_prefix: str
    workers: int = 1
    keys: tuple[str, ...] = ("text",)
    template: str = "plain"
    on_error: str = "stop"
    """`stop` at the first bad document, or `skip` it into the rejects file."""
    text_lines: bool = False
    """Each line of a `.txt` file is a document, else each file."""
    allow_special: bool = False
    mask_prompts: bool = False
    """Beside the dataset a loss mask, in which of conversations the answers alone count."""

    @property
    def prefixes(self) -> list[str]:
        """Prefix of the dataset of each key."""
        return [f"{self.output_prefix}_{key}_document" for key in self.keys]

    @property
    def rejects(self) -> Path:
        """The file of skipped documents."""
        return Path(f"{self.prefixes[0]}.rejects.jsonl")


@dataclass(frozen=True)
class PrepareResult:
    """What was made."""

    prefixes: list[str]
    documents: int
    tokens: list[int]
    rejected: int
    text_bytes: int
    """Characters of text, all parts."""
    seconds: float
    resumed_parts: int
    counted: int | None = None
    """Tokens that count in the loss, where there is a mask."""


def make_datasets(request: PrepareOptions, tokenizer: Tokenizer) -> PrepareResult:
    """Makes the datasets, or goes on from the parts of an interrupted run.

    Raises `UserError` for wrong inputs, a bad document under `stop`, inputs that change meanwhile, and
    inputs without a document.
    """
    started = time.monotonic()
    sources = find_sources(request.inputs)
    Path(request.output_prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
    masks = [mask_prefix(request.prefixes[0])] if request.mask_prompts else []
    plan = _plan(request, sources, tokenizer)
    assembly = DatasetWriter(request.prefixes + masks, plan, masked=request.mask_prompts)
    try:
        checksums = _append_parts(request, sources, assembly, tokenizer)
        _check_unchanged(sources)
        state = assembly.state
        if not state["documents"]:
            rejected = f", {state['rejected']} bad documents" if state["rejected"] else ""
            raise UserError(f"the inputs hold no document ({len(sources)} files{rejected})")
        inputs = [
            {"path": source.path, "size": source.size, "sha256": checksums[source.path]} for source in sources
        ]
        metas = [_meta(request, tokenizer, state, inputs, i) for i in range(len(request.keys))]
        assembly.finish(metas, request.rejects)
    finally:
        assembly.close()
    return PrepareResult(
        request.prefixes,
        state["documents"],
        [size // 4 for size in state["bin"][: len(request.keys)]],
        state["rejected"],
        state["text"],
        time.monotonic() - started,
        assembly.resumed_parts,
        state["counted"] if request.mask_prompts else None,
    )


def _plan(request: PrepareOptions, sources: list[Source], tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the bytes of the output; not the workers, and not what is done with bad documents."""
    return {
        "format": _FORMAT,
        "block_bytes": BLOCK_BYTES,
        "tokenizer": tokenizer.fingerprint,
        "sources": [source.to_json() for source in sources],
        "reading": asdict(_reading(request)),
        "text_lines": request.text_lines,
        "allow_special": request.allow_special,
    }


def _reading(request: PrepareOptions) -> ReaderOptions:
    return ReaderOptions(request.keys, request.template, request.mask_prompts)


@dataclass(frozen=True)
class _Checksum:
    """A task: the SHA-256 of an input file."""

    source: Source


def _tasks(sources: list[Source], blocks: Iterator[Block]) -> Iterator[Block | _Checksum]:
    """The blocks, and each file's checksum ahead of its first block."""
    summed: set[str] = set()
    for block in blocks:
        if block.source.path not in summed:
            summed.add(block.source.path)
            yield _Checksum(block.source)
        yield block
    yield from (_Checksum(source) for source in sources if source.path not in summed)


def _append_parts(
    request: PrepareOptions, sources: list[Source], assembly: DatasetWriter, tokenizer: Tokenizer
) -> dict[str, str]:
    """Encodes what is not yet done; gives the checksum of each input."""
    encoder = Encoder(tokenizer, _reading(request), request.allow_special)

    def work(task: Block | _Checksum) -> EncodedBlock | str:
        return sha256(task.source.path) if isinstance(task, _Checksum) else encoder.encode(task)

    blocks = cut(sources, text_lines=request.text_lines, columns=request.keys)
    done = sum(block.weight for block in islice(blocks, assembly.resumed_parts))
    before = assembly.state
    progress = Progress(sum(source.size for source in sources), done)
    checksums: dict[str, str] = {}
    tasks = _tasks(sources, blocks)
    try:
        for task, result in run_tasks(work, tasks, request.workers, ahead=_AHEAD * request.workers):
            if isinstance(task, _Checksum):
                checksums[task.source.path] = result
                continue
            _append(assembly, task, result, request)
            done += task.weight
            state = assembly.state
            progress.update(
                done,
                state["documents"] - before["documents"],
                state["text"] - before["text"],
                all_tokens=sum(state["bin"][: len(request.keys)]) // 4,
            )
    finally:
        progress.close()
    return checksums


def _append(assembly: DatasetWriter, block: Block, part: EncodedBlock, request: PrepareOptions) -> None:
    path = block.source.path
    if part.lines:
        base = assembly.line_base(path)
        for record in part.rejects:
            record["line"] += base
    if part.rejects and request.on_error == "stop":
        bad = part.rejects[0]
        row = "row" if block.source.form == "parquet" else "line"
        raise UserError(
            f"{bad['file']}, {row} {bad['line']}: {bad['reason']}; mend it, or give --on-error skip to put "
            f"such documents into {request.rejects}"
        )
    assembly.append(part, path)


def _check_unchanged(sources: list[Source]) -> None:
    for source in sources:
        now = find_sources([source.path])[0]
        if now != source:
            raise UserError(f"input {source.path} changed while it was read; run the command again")


def _meta(
    request: PrepareOptions, tokenizer: Tokenizer, state: dict[str, Any], inputs: list[dict[str, Any]], i: int
) -> dict[str, Any]:
    counts = {
        "documents": state["documents"],
        "tokens": state["bin"][i] // 4,
        "min_id": state["low"][i],
        "max_id": state["high"][i],
        "rejected": state["rejected"],
    }
    return make_meta(
        tokenizer_facts(tokenizer),
        counts,
        inputs,
        framing="[CLS] ids </s>",
        json_key=request.keys[i],
        conversation_template=request.template,
        special_tokens_parsed=request.allow_special,
    )
