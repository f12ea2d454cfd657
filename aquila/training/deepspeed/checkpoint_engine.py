"""State as copies in host memory, to be written to files while training goes on."""

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Snapshot(NamedTuple):
    """A file to be written: `torch.save(state, path)`."""

    state: Any
    path: Path


class InMemoryCheckpointEngine:
    """Stands in for DeepSpeed's writer of checkpoints: takes copies, or the state itself; writes nothing."""

    def __init__(self, taken: list[Snapshot], *, copy: bool = True) -> None:
        self._taken, self._copy = taken, copy

    def save(self, state_dict: Any, path: str) -> None:
        self._taken.append(Snapshot(to_host(state_dict) if self._copy else state_dict, Path(path)))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, rank: int) -> bool:
        return rank == 0

    def preserves_storage_sharing(self) -> bool:
        return False


def to_host(state: Any) -> Any:
    """A copy of nested dicts and lists with every tensor copied into host memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)((key, to_host(value)) for key, value in state.items())
    if isinstance(state, list | tuple) and not hasattr(state, "_fields"):
        return type(state)(to_host(value) for value in state)
    return copy.deepcopy(state)
