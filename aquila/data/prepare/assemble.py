"""The output of an unfinished run: parts appended in order, a journal of them, the last rename.

Everything lies in a work folder beside the output until it is whole. The journal has a line for the
plan (inputs, tokenizer, options), then one for each part appended. A run killed at any moment leaves
at most one part half appended; the next run with the same plan cuts that off and goes on.
"""

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from aquila.core.errors import UserError
from aquila.core.files import sha256, sync_file
from aquila.core.jsonl import objects
from aquila.core.lock import HeldError, take_lock
from aquila.data.indexfile import bin_path, idx_path, write_index
from aquila.data.loss_mask import MASK_DTYPE, mask_prefix
from aquila.data.meta import meta_path, write_meta
from aquila.data.prepare.encode import EncodedBlock

_COPY = 1 << 22


class DatasetWriter:
    """Appends parts; after `finish` the datasets stand under their final names.

    `state` holds the running totals: `parts`, `documents`, `bin` and `rejects` (bytes), `low`, `high`,
    `counted` (of a mask), `lines` (of the current file) and `file` (its path). `masked`: the last of the
    prefixes is the loss mask of the first.
    """

    def __init__(self, prefixes: list[str], plan: dict[str, Any], *, masked: bool = False) -> None:
        self._prefixes = prefixes
        self._masked = masked
        self._folder = Path(f"{prefixes[0]}.partial")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._plan = json.dumps(plan, sort_keys=True)
        outputs = len(prefixes)
        self.state: dict[str, Any] = {
            "parts": 0, "documents": 0, "text": 0, "rejected": 0, "rejects": 0, "file": "", "lines": 0,
            "counted": 0,
            "bin": [0] * outputs, "low": [0] * outputs, "high": [-1] * outputs, "crc": [0] * outputs,
        }  # fmt: skip
        self._digests = [hashlib.sha256() for _ in prefixes]
        self.resumed_parts = self._recover()
        self._bins = [self._open(f"{i}.bin", self.state["bin"][i]) for i in range(outputs)]
        self._lengths = [self._open(f"{i}.lengths", 4 * self.state["documents"]) for i in range(outputs)]
        self._rejects = self._open("rejects.jsonl", self.state["rejects"])

    def _lock(self) -> None:
        try:
            # Workers forked later must not hold it on after a kill.
            self._lock_file = take_lock(self._folder / "lock", inherited=False)
        except HeldError:
            raise UserError(
                f"another process is making {self._prefixes[0]}; wait for it, or choose another output prefix"
            ) from None

    def _recover(self) -> int:
        """Takes over the parts of an interrupted run with the same plan; gives their number."""
        journal = self._folder / "journal"
        good = 0
        if journal.is_file():
            with journal.open("rb") as file:
                same = file.readline() == self._plan.encode() + b"\n"
                good = file.tell() if same else 0
                for line in file if same else ():
                    state = objects(line)
                    if not line.endswith(b"\n") or not state or not self._verify(state[0]):
                        break
                    good += len(line)
        if not good:
            # Removed, not emptied: a run killed while finishing shares its files with the final names.
            for path in self._folder.iterdir():
                if path.name != "lock":
                    path.unlink()
        self._journal = self._open("journal", good)
        if not good:
            self._journal.write(self._plan.encode() + b"\n")
            self._journal.flush()
        return self.state["parts"]

    def _verify(self, state: dict[str, Any]) -> bool:
        """Whether the part that led to `state` is on disk as it was written; if so, it counts."""
        if _form(state) != _form(self.state):  # a line that has been overwritten
            return False
        chunks = []
        for i, start in enumerate(self.state["bin"]):
            try:
                with (self._folder / f"{i}.bin").open("rb") as file:
                    file.seek(start)
                    chunks.append(file.read(state["bin"][i] - start))
                lengths = (self._folder / f"{i}.lengths").stat().st_size
            except OSError:
                return False
            if zlib.crc32(chunks[i]) != state["crc"][i] or lengths < 4 * state["documents"]:
                return False
        rejects = self._folder / "rejects.jsonl"
        if not rejects.is_file() or rejects.stat().st_size < state["rejects"]:
            return False
        for digest, chunk in zip(self._digests, chunks, strict=True):
            digest.update(chunk)
        self.state = state
        return True

    def _open(self, name: str, size: int):
        path = self._folder / name
        path.touch()
        file = path.open("r+b")
        file.truncate(size)
        file.seek(size)
        return file

    def append(self, part: EncodedBlock, path: str) -> None:
        """Adds a part of the file `path`; it counts once its line of the journal is written."""
        state = json.loads(json.dumps(self.state))
        if state["file"] != path:
            state |= {"file": path, "lines": 0}
        for record in part.rejects:
            data = json.dumps(record).encode() + b"\n"
            self._rejects.write(data)
            state["rejects"] += len(data)
        for i, output in enumerate(part.outputs):
            self._bins[i].write(output.tokens)
            self._lengths[i].write(output.lengths)
            self._digests[i].update(output.tokens)
            state["bin"][i] += len(output.tokens)
            state["crc"][i] = output.crc
            state["counted"] += output.counted
            if output.tokens:
                first = state["high"][i] < 0
                state["low"][i] = output.lowest if first else min(state["low"][i], output.lowest)
                state["high"][i] = max(state["high"][i], output.highest)
        state["parts"] += 1
        state["documents"] += part.documents
        state["text"] += part.text_bytes
        state["rejected"] += len(part.rejects)
        state["lines"] += part.lines
        self._flush()
        self._journal.write(json.dumps(state).encode() + b"\n")
        self._journal.flush()
        self.state = state

    def _flush(self) -> None:
        for file in (*self._bins, *self._lengths, self._rejects):
            file.flush()

    def line_base(self, path: str) -> int:
        """Lines of `path` in the parts before the next one."""
        return self.state["lines"] if self.state["file"] == path else 0

    def finish(self, metas: list[dict[str, Any]], rejects_name: Path) -> None:
        """Writes the indexes, puts every file under its final name, removes the work folder.

        An older dataset of the same name loses its `.idx` first, and the new `.idx` comes last: no moment
        shows files of two makings as one dataset.
        """
        indexes = [self._folder / f"{i}.idx" for i in range(len(self._prefixes))]
        mask = len(indexes) - 1 if self._masked else None
        for i, index in enumerate(indexes):
            sync_file(self._bins[i])
            self._lengths[i].flush()
            lengths = np.fromfile(self._folder / f"{i}.lengths", "<i4", self.state["documents"])
            with index.open("wb") as file:
                write_index(file, lengths, None, MASK_DTYPE if i == mask else "<i4")
                sync_file(file)
        for i, prefix in enumerate(self._prefixes[: len(metas)]):
            idx_path(prefix).unlink(missing_ok=True)
            for path in (bin_path(mask_prefix(prefix)), idx_path(mask_prefix(prefix))):
                path.unlink(missing_ok=True)  # of an older making
            if i == 0 and mask is not None:
                facts = {"bin_sha256": self._digests[mask].hexdigest(), "idx_sha256": sha256(indexes[mask])}
                metas[0]["loss_mask"] = {"counted": self.state["counted"], **facts}
                _give_name(self._folder / f"{mask}.bin", bin_path(self._prefixes[mask]))
                _give_name(indexes[mask], idx_path(self._prefixes[mask]))
            meta = metas[i]
            meta["bin_sha256"] = self._digests[i].hexdigest()
            meta["idx_sha256"] = sha256(indexes[i])
            meta_path(prefix).unlink(missing_ok=True)
            _give_name(self._folder / f"{i}.bin", bin_path(prefix))
            write_meta(self._folder / f"{i}.meta", meta)
            _give_name(self._folder / f"{i}.meta", meta_path(prefix))
            _give_name(indexes[i], idx_path(prefix))
        if self.state["rejected"]:
            sync_file(self._rejects)
            _give_name(self._folder / "rejects.jsonl", rejects_name)
        else:
            rejects_name.unlink(missing_ok=True)
        self.close()
        shutil.rmtree(self._folder)

    def close(self) -> None:
        """Closes every file; what was appended stays for the next run."""
        for file in (*self._bins, *self._lengths, self._rejects, self._journal, self._lock_file):
            file.close()


def _give_name(path: Path, name: Path) -> None:
    """Puts `path` under `name` and keeps it, so that a run killed meanwhile can do it again."""
    second = path.with_suffix(".link")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:  # a file system without second names: the run would begin anew
        second = path
    os.replace(second, name)


def _form(value: Any) -> Any:
    """The types within a value of JSON."""
    if isinstance(value, dict):
        return {key: _form(item) for key, item in value.items()}
    return [_form(item) for item in value] if isinstance(value, list) else type(value)
