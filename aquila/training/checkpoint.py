"""Checkpoints: written whole or not at all, verified before they are used.

A checkpoint `checkpoints/step-00001000/` holds the model folder of that step (`model.safetensors`,
`config.json`, the tokenizer's files: `generate.py` and `AquilaModel.from_pretrained` take it as it
is), `deepspeed/` with each rank's share of master weights and optimizer state, `rng/` with each
rank's random state, `state.json`, and `manifest.json` with size and checksum of every file.
"""

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from aquila.config import EffectiveConfig
from aquila.errors import UserError
from aquila.model.weights import save_weights
from aquila.training.engine import SHARDS, Engine
from aquila.training.state import TrainState

FOLDER = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.model", "tokenizer.json")
_BLOCK = 1 << 20


def step_folder(step: int) -> str:
    """The checkpoint's name; they sort by step."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Checkpointer:
    """Writes and reads the checkpoints of one run folder, all ranks together."""

    run_dir: Path
    engine: Engine
    effective: EffectiveConfig
    rank: int
    world_size: int

    @property
    def folder(self) -> Path:
        return self.run_dir / FOLDER

    def save(self, state: TrainState) -> Path:
        """Writes the checkpoint of `state.step`: temporary folder, barrier, manifest, rename, `latest`.

        Raises `OSError` on every rank when any rank could not write; older checkpoints stay whole.
        """
        final = self.folder / step_folder(state.step)
        partial = self.folder / f".{final.name}.partial"
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        problem, entries = None, {}
        try:
            entries = self._write_own_files(partial, state)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            problem = f"rank {self.rank}: {error}"
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, (entries, problem))
        problems = [text for _, text in gathered if text]
        if not problems and self.rank == 0:
            try:
                self._commit(
                    partial, final, {name: entry for files, _ in gathered for name, entry in files.items()}
                )
            except OSError as error:
                problems = [f"rank 0: {error}"]
        outcome = [problems]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError("; ".join(outcome[0]))
        return final

    def _write_own_files(self, partial: Path, state: TrainState) -> dict[str, dict[str, Any]]:
        run = self.effective.run
        weights = self.engine.weights()
        if self.rank == 0:
            save_weights(weights, partial)
            for name in ("config.json", *TOKENIZER_FILES):
                if (self.effective.model_dir / name).is_file():
                    shutil.copyfile(self.effective.model_dir / name, partial / name)
            (partial / STATE).write_text(json.dumps(self._state(state), indent=1), encoding="utf-8")
        if run.save_rng:
            (partial / "rng").mkdir(exist_ok=True)
            torch.save(random_state(), partial / "rng" / f"rank-{self.rank:05d}.pt")
        if run.save_optim:
            self.engine.save_shards(partial)
        return {name: fingerprint(partial / name) for name in self._own_files(partial)}

    def _own_files(self, partial: Path) -> list[str]:
        """Each file is summed by one rank: its own random state, its share, and rank 0 the rest."""
        names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        mine = [f"rng/rank-{self.rank:05d}.pt"] + [n for n in names if f"_pp_rank_{self.rank}_" in n]
        if self.rank == 0:
            mine += [n for n in names if "/" not in n or (n.startswith(SHARDS) and "_pp_rank_" not in n)]
        return [name for name in names if name in set(mine)]

    def _state(self, state: TrainState) -> dict[str, Any]:
        from aquila import __version__

        run = self.effective.run
        return {
            **state.to_dict(),
            "world_size": self.world_size,
            "batch_size": run.batch_size,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "seq_length": self.effective.seq_length,
            "seed": run.seed,
            "precision": run.precision,
            "zero_stage": run.zero_stage,
            "version": __version__,
            "torch": torch.__version__,
        }

    def _commit(self, partial: Path, final: Path, entries: dict[str, dict[str, Any]]) -> None:
        (partial / MANIFEST).write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
        for path in partial.rglob("*"):
            _sync(path)
        _sync(partial)
        if final.exists():  # the same step, taken again after resuming from an earlier one
            shutil.rmtree(final)
        os.rename(partial, final)
        write_atomically(self.folder / LATEST, final.name + "\n")
        self._drop_old()

    def _drop_old(self) -> None:
        keep = self.effective.run.keep_checkpoints
        for old in list_checkpoints(self.folder)[:-keep] if keep else []:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, folder: Path) -> TrainState:
        """Takes optimizer, master weights and random state from `folder`; the weights are loaded before."""
        state = read_state(folder)
        if (folder / SHARDS).is_dir():
            self._load_shards(folder, state)
        elif self.rank == 0:
            print(f"warning: {folder} holds no optimizer state: the resumed run is not exact", flush=True)
        own = folder / "rng" / f"rank-{self.rank:05d}.pt"
        if own.is_file():
            restore_random_state(torch.load(own, weights_only=False))
        return TrainState(**{key: state[key] for key in TrainState.__dataclass_fields__})

    def _load_shards(self, folder: Path, state: dict[str, Any]) -> None:
        if state["world_size"] != self.world_size:
            raise UserError(
                f"{folder}: its optimizer state is of {state['world_size']} devices, this run has "
                f"{self.world_size}; use as many, or resume=never with bmt_pre_load=True from its weights"
            )
        self.engine.load_shards(folder)


def find_resume(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, verified; None to start anew.

    With `auto` a damaged checkpoint is named and the newest whole one before it is used. Raises
    `UserError` for a given path that is no whole checkpoint, and when none of several is whole.
    """
    if resume == "never":
        return None
    if resume != "auto":
        folder = Path(resume)
        problem = damage(folder)
        if problem:
            raise UserError(f"resume={resume}: {problem}")
        return folder
    found = list_checkpoints(run_dir / FOLDER)
    for folder in reversed(found):
        problem = damage(folder)
        if problem is None:
            return folder
        print(f"warning: checkpoint {folder} is not whole and is not used: {problem}", flush=True)
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {run_dir / FOLDER} is whole; "
            "restore one, or start anew under another experiment name or with resume=never"
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints by step, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint `folder`, compared with its manifest; None when it is whole."""
    if not folder.is_dir():
        return f"{folder} does not exist"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"file {name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"file {name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if fingerprint(path) != expected:
            return f"file {name} is damaged (its checksum differs)"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text` so that a crash leaves the old content or the new, and both synced."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def random_state() -> dict[str, Any]:
    """The state of every generator a step may draw from."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.accelerator.is_available():
        state["device"] = torch.get_device_module().get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "device" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["device"])
