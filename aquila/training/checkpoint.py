"""Checkpoints: written whole or not at all, while training goes on.

A checkpoint `checkpoints/step-00001000/` holds the model folder of that step (`model.safetensors`, under
ZeRO-3 a part from each rank with an index; `config.json`, the tokenizer's files: `generate.py` and
`AquilaModel.from_pretrained` take it as it is), `deepspeed/` with each rank's share of master weights and
optimizer state, `rng/` with each rank's random state, `state.json`, `data_order.json` with the samples
consumed so far, and `manifest.json` with size and checksum of every file.

`begin` copies the state into host memory (not with `background_save: False`) and starts a thread that
writes, syncs and sums this rank's files; `finish`, on all ranks at one step boundary, renames the folder and
replaces `latest`.
"""

import contextlib
import json
import math
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import aquila
from aquila.config import EffectiveConfig
from aquila.core.checkpoints import (
    FOLDER,
    LATEST,
    MANIFEST,
    STATE,
    fingerprint,
    list_checkpoints,
    step_folder,
    step_of,
)
from aquila.core.files import sync, write_atomically
from aquila.model.files import TensorInfo
from aquila.model.weights import write_parts
from aquila.training.deepspeed.engine import SHARDS, Engine
from aquila.training.deepspeed.ranks import on_first_rank
from aquila.training.resume import launch_id
from aquila.training.rng import random_state
from aquila.training.state import TrainState

MODEL_FILES = (
    "config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.model", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip


@dataclass
class _Save:
    """A checkpoint on its way: the thread's result is `entries` (file to fingerprint) or `problem`."""

    step: int
    partial: Path
    thread: threading.Thread | None = None
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str | None = None


class Checkpointer:
    """Writes the checkpoints of one run folder, all ranks together; one at a time."""

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        effective: EffectiveConfig,
        rank: int,
        world_size: int,
        *,
        beside: dict[str, str] | None = None,
    ) -> None:
        """beside: further files of every checkpoint, name to text."""
        self.folder = run_dir / FOLDER
        self._engine = engine
        self._effective = effective
        self._rank = rank
        self._world_size = world_size
        self._beside = beside or {}
        self._save: _Save | None = None
        self.stall_seconds = 0.0
        """How long training stood still for saving, since this was last set to 0."""

    @property
    def busy(self) -> bool:
        """A save has begun and is not finished."""
        return self._save is not None

    @property
    def written(self) -> bool:
        """This rank's part of the save is on the disk, or has failed: `finish` will not wait for it."""
        return self._save is not None and not (self._save.thread and self._save.thread.is_alive())

    def begin(self, state: TrainState) -> None:
        """Copies the state of `state.step` and starts writing it. All ranks together."""
        assert self._save is None
        started = time.perf_counter()
        partial = self.folder / f".{step_folder(state.step)}.partial"
        save = _Save(state.step, partial)
        self._save = save
        save.problem = on_first_rank(lambda: _make_folders(partial))
        if save.problem:
            return
        run = self._effective.run
        copy = run.background_save  # otherwise the caller waits, and nothing changes meanwhile
        weights, parts = self._engine.weights(copy=copy)
        shards = self._engine.snapshot_shards(partial, copy=copy) if run.save_optim else []
        generators = random_state() if run.save_rng else None
        facts = self._facts(state)

        def write() -> None:
            try:
                self._write(save, weights, parts, shards, generators, facts)
            except Exception as error:  # a full disk comes as OSError or, from torch, as RuntimeError
                save.problem = f"{type(error).__name__}: {error}"

        save.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        save.thread.start()
        self.stall_seconds += time.perf_counter() - started

    def _wait(self, thread: threading.Thread | None) -> None:
        """Until every rank's part is written. The ranks tell one another every second that they go on."""
        end = time.monotonic() + (self._effective.run.save_timeout or math.inf)
        while True:
            if thread is not None:
                thread.join(1.0)
            working = thread is not None and thread.is_alive()
            (left,) = self._engine.gather(working)
            if not any(left):
                return
            if time.monotonic() < end:
                self._engine.alive()

    def finish(self) -> tuple[Path, int]:
        """Waits for every rank's part and commits the checkpoint: its folder and step. All ranks together.

        Raises `OSError` on every rank when any could not write; older checkpoints stay whole.
        """
        save, self._save = self._save, None
        assert save is not None
        started = time.perf_counter()
        self._wait(save.thread)
        final = self.folder / step_folder(save.step)
        gathered: list[Any] = [None] * self._world_size
        dist.all_gather_object(gathered, (save.entries, save.problem))
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(gathered) if problem]
        entries = {name: entry for files, _ in gathered for name, entry in files.items()}
        problems = on_first_rank(
            lambda: self._conclude(save.partial, final, entries, problems), self._engine.alive
        )
        self.stall_seconds += time.perf_counter() - started
        if problems:
            raise OSError("; ".join(problems))
        return final, save.step

    def _conclude(
        self, partial: Path, final: Path, entries: dict[str, dict[str, Any]], problems: list[str]
    ) -> list[str]:
        """Commits the checkpoint, or removes what there is of it; what went wrong."""
        try:
            if not problems:
                self._commit(partial, final, entries)
        except OSError as error:
            problems = [f"rank 0: {error}"]
        if problems:
            shutil.rmtree(partial, ignore_errors=True)
        return problems

    def _write(
        self,
        save: _Save,
        weights: dict[str, torch.Tensor],
        parts: list[dict[str, TensorInfo]],
        shards: list,
        generators: dict[str, Any] | None,
        facts: dict[str, Any],
    ) -> None:
        """This rank's files: its weights, random state and shards; rank 0's the rest of the model folder."""
        mine = []
        if weights:
            mine += write_parts(save.partial, parts, weights.__getitem__, only=self._rank)
        if self._rank == 0:
            for name in MODEL_FILES:
                if (self._effective.model_dir / name).is_file():
                    mine.append(save.partial / name)
                    shutil.copyfile(self._effective.model_dir / name, mine[-1])
            for name, text in {**self._beside, STATE: json.dumps(facts, indent=1)}.items():
                mine.append(save.partial / name)
                mine[-1].write_text(text, encoding="utf-8")
        if generators is not None:
            mine.append(save.partial / "rng" / f"rank-{self._rank:05d}.pt")
            torch.save(generators, mine[-1])
        for state, path in shards:
            mine.append(path)
            torch.save(state, path)
        for path in mine:
            sync(path)
            save.entries[str(path.relative_to(save.partial))] = fingerprint(path)

    def _facts(self, state: TrainState) -> dict[str, Any]:
        run = self._effective.run
        return {
            **state.to_dict(),
            "world_size": self._world_size,
            "batch_size": run.batch_size,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "seq_length": self._effective.seq_length,
            "seed": run.seed,
            "precision": run.precision,
            "zero_stage": run.zero_stage,
            "sequence_parallel": run.sequence_parallel,
            "optimizer": run.optimizer,
            "launch": launch_id(),
            "version": aquila.__version__,
            "torch": torch.__version__,
        }

    def _commit(self, partial: Path, final: Path, entries: dict[str, dict[str, Any]]) -> None:
        for name in ("rng", SHARDS):
            if not any((partial / name).iterdir()):
                (partial / name).rmdir()
        manifest = partial / MANIFEST
        manifest.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
        sync(manifest)
        for folder in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
            sync(folder)
        if final.exists():  # the same step, taken again: that one was damaged, or another run's
            _remove(final)
        os.rename(partial, final)
        for folder in (self.folder, *self.folder.parents[:3]):  # up to checkpoints_out/, which may be new
            sync(folder)
        write_atomically(self.folder / LATEST, final.name + "\n")
        self._drop_old(step_of(final))

    def _drop_old(self, newest: int) -> None:
        """Keeps the newest `keep_checkpoints` up to step `newest`, and those that `keep_every` keeps.

        A later one is damaged, and was not gone on from: it does not count as one of the newest.
        """
        run = self._effective.run
        if run.keep_checkpoints:
            ours = [path for path in list_checkpoints(self.folder) if step_of(path) <= newest]
            for old in ours[: -run.keep_checkpoints]:
                if not (run.keep_every and step_of(old) % run.keep_every == 0):
                    with contextlib.suppress(OSError):  # the new one is safe, whatever becomes of this
                        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Takes the name away first: a process that is killed meanwhile leaves no half of a checkpoint."""
    going = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(going, ignore_errors=True)
    os.rename(checkpoint, going)
    shutil.rmtree(going, ignore_errors=True)


def _make_folders(partial: Path) -> str | None:
    """An empty folder to write into; what went wrong, if it did."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for name in ("rng", SHARDS):
            (partial / name).mkdir(parents=True)
    except OSError as error:
        return str(error)
    return None
