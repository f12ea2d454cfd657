"""Where the shards of a checkpoint keep each parameter's master weights and moments, and reading any part.

A shard is the file of one rank. ZeRO-1 and 2 lay a group's parameters end to end and cut that into equal
parts, one a rank; ZeRO-3 cuts each parameter into equal parts. Here both are fragments: elements `first` to
`first + numel` of a parameter, at a place in a file. Opening reads what the files say of their tensors and
none of the values, so that any rank can read, from all files, just what it is to hold.

Frozen: the forms that are read, which are those of checkpoints that exist.
Guarded by: tests/unit/training/deepspeed/test_saved_state.py, tests/integration/test_state_conversion.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from aquila.core.errors import UserError
from aquila.model.files import as_bytes
from aquila.training.deepspeed.safe_load import load

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
_STAGE = 1 << 22
"""Elements that are read at a time."""


class StoredTensor(NamedTuple):
    """A flat tensor in a file of `torch.save`: `numel` numbers of `dtype` from byte `offset` on."""

    file: Path
    offset: int
    numel: int
    dtype: torch.dtype

    def parts(self, first: int, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Elements `first` to `first + numel`, a block at a time: (elements before it, its values)."""
        if first < 0 or first + numel > self.numel:
            raise UserError(f"{self.file}: elements {first} to {first + numel} of {self.numel} are asked for")
        stage = torch.empty(min(_STAGE, numel), dtype=self.dtype)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset + first * self.dtype.itemsize)
            for done in range(0, numel, _STAGE):
                part = stage[: numel - done]
                view, filled = as_bytes(part), 0
                while filled < len(view):
                    count = file.readinto(view[filled:])
                    if not count:
                        raise UserError(f"{self.file}: cut short; use another checkpoint")
                    filled += count
                yield done, part


class Fragment(NamedTuple):
    """Elements `first` to `first + numel` of a parameter: those from `start` on of each of `tensors`.

    tensors: by MASTER and MOMENTS; without moments when no step had been taken.
    """

    first: int
    numel: int
    start: int
    tensors: dict[str, StoredTensor]


class SavedState:
    """The optimizer state of a checkpoint, parameter by parameter.

    fragments: of each parameter in order. step: optimizer steps that the moments have seen.
    loss_scaler: DeepSpeed's own, of the first rank. Raises `UserError` for shards that are missing, damaged
    or do not cover `shapes` (name to shape) once.
    """

    def __init__(self, shards: Path, world_size: int, shapes: dict[str, torch.Size]) -> None:
        self.fragments: dict[str, list[Fragment]] = {name: [] for name in shapes}
        self.step, self.loss_scaler = 0.0, None
        self._where = shards
        try:
            for rank in range(world_size):
                file = _only(shards, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
                state = _header(file)["optimizer_state_dict"]
                self._add(state, file, rank, world_size, shapes)
                if rank == 0:
                    self.loss_scaler = state["loss_scaler"]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{shards}: not the shards of this model ({type(error).__name__}: {error}); "
                "use another checkpoint"
            ) from None
        self._check(shapes)

    def _add(
        self, state: dict[str, Any], file: Path, rank: int, ranks: int, shapes: dict[str, torch.Size]
    ) -> None:
        """The fragments of one rank."""
        if "fp32_flat_groups" in state:
            places = _of_zero_3(state, rank, ranks, _parameter_order(self._where), shapes)
            masters, base = state["fp32_flat_groups"], state["optimizer_state_dict"]
        else:
            places = _of_zero_2(state)
            masters, base = state["single_partition_of_fp32_groups"], state["base_optimizer_state"]
        # `elastic_checkpoint` makes a list of what torch numbers.
        states = dict(enumerate(base)) if isinstance(base, list) else base["state"]
        tensors = []
        for number, master in enumerate(masters):
            found = {MASTER: _stored(file, master)}
            moments = states.get(number, {})
            found |= {key: _stored(file, moments[key]) for key in MOMENTS if key in moments}
            tensors.append(found)
            if rank == 0 and number == 0:
                self.step = _step(file, moments, base)
        for name, group, start, numel in places:
            mine = self.fragments[name]
            first = mine[-1].first + mine[-1].numel if mine else 0
            mine.append(Fragment(first, min(numel, shapes[name].numel() - first), start, tensors[group]))

    def _check(self, shapes: dict[str, torch.Size]) -> None:
        for name, shape in shapes.items():
            held = sum(fragment.numel for fragment in self.fragments[name])
            if held != shape.numel() or any(fragment.numel < 0 for fragment in self.fragments[name]):
                raise UserError(
                    f"{self._where}: holds {held} elements of {name}, which has {shape.numel()}; "
                    "use another checkpoint"
                )

    def read(self, name: str, key: str, first: int, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Elements `first` to `first + numel` of a parameter's `key`, a block at a time: (elements before it,
        values). Nothing at all for moments of before the first step."""
        for fragment in self.fragments[name]:
            begin, end = max(first, fragment.first), min(first + numel, fragment.first + fragment.numel)
            if begin < end and key in fragment.tensors:
                start = fragment.start + begin - fragment.first
                for done, values in fragment.tensors[key].parts(start, end - begin):
                    yield begin - first + done, values


def _of_zero_2(state: dict[str, Any]) -> Iterator[tuple[str, int, int, int]]:
    """(parameter, group, start, elements) of what a rank holds under ZeRO-1 and 2."""
    for group, places in enumerate(state["param_slice_mappings"]):
        for name, place in places.items():
            yield name, group, int(place.start), int(place.numel)


def _of_zero_3(
    state: dict[str, Any], rank: int, ranks: int, order: list[list[str]], shapes: dict[str, torch.Size]
) -> Iterator[tuple[str, int, int, int]]:
    """The same under ZeRO-3: the parts of a group's parameters, in tensors that hold whole parts each."""
    sizes = [flat.numel() for flat in state["fp32_flat_groups"]]
    group, start = 0, 0
    for name in (name for names in order for name in names):
        whole = shapes[name].numel()
        part = -(-whole // ranks)
        while start + part > sizes[group]:
            group, start = group + 1, 0
        yield name, group, start, max(0, min(part, whole - rank * part))
        start += part


def _parameter_order(shards: Path) -> list[list[str]]:
    """The names of the parameters, by group of the optimizer, in order."""
    facts = _header(_only(shards, "*zero_pp_rank_0_mp_rank_00_model_states.pt"))
    return [list(group) for group in facts["param_shapes"]]


def _only(shards: Path, pattern: str) -> Path:
    found = sorted(shards.glob(pattern))
    if not found:
        raise UserError(f"{shards}: {pattern.lstrip('*')} is missing; use another checkpoint")
    return found[0]


def _header(file: Path) -> dict[str, Any]:
    """What a file of `torch.save` holds, its tensors without values but with their places."""
    with FakeTensorMode():
        return load(file)


def _stored(file: Path, tensor: Tensor) -> StoredTensor:
    storage: Any = tensor.untyped_storage()
    place = storage._checkpoint_offset + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return StoredTensor(file, place, tensor.numel(), tensor.dtype)


def _step(file: Path, moments: dict[str, Any], base: Any) -> float:
    """Of the optimizer: torch counts in each state, others in the group."""
    step = moments.get("step")
    if step is None and isinstance(base, dict):
        step = base["param_groups"][0].get("step")
    if isinstance(step, Tensor):
        ((_, value),) = _stored(file, step).parts(0, 1)
        return float(value)
    return float(step or 0)
