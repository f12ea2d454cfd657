"""Optimizer state back from a checkpoint, whatever ZeRO stage, number of ranks and precision wrote it.

Each rank reads from all shards just what it is to hold, straight into place: no copy of the checkpoint, no
rank that converts for all, and besides its own state a rank holds a block. Every master weight is compared
with the weights beside it, of which it must be the unrounded value.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from aquila.core.errors import UserError
from aquila.training.deepspeed.saved_state import MASTER, MOMENTS, SavedState
from aquila.training.deepspeed.zero_step import adamw_state

_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in DeepSpeed's dynamic loss scaler; the rest is configuration."""


class Part(NamedTuple):
    """What a rank holds of a parameter: elements `first` to `first + numel`, from `start` on of the flat
    `master` and its moments. weight: the same elements in the training dtype."""

    name: str
    first: int
    numel: int
    master: Tensor
    start: int
    weight: Tensor


@torch.no_grad()
def restore(zero: Any, model: torch.nn.Module, shards: Path, world_size: int, saved: torch.dtype) -> None:
    """Fills DeepSpeed's ZeRO optimizer from `shards` of `world_size` ranks. All ranks together.

    saved: the training dtype of the checkpoint's run, to which its weights are rounded. The model has its
    weights already. Raises `UserError` on every rank when any finds a fault.
    """
    problem = None
    try:
        _restore(zero, model, shards, world_size, saved)
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        raise UserError(problem)


def _restore(zero: Any, model: torch.nn.Module, shards: Path, world_size: int, saved: torch.dtype) -> None:
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}
    state = SavedState(shards, world_size, shapes)
    for master in masters(zero):
        adamw_state(zero.optimizer, master)
    for part in own_parts(zero, model):
        _read_master(state, part, saved, shards)
        moments = zero.optimizer.state[part.master]
        for key in MOMENTS:
            place = moments[key].narrow(0, part.start, part.numel)
            for done, values in state.read(part.name, key, part.first, part.numel):
                place.narrow(0, done, len(values)).copy_(values)
    _set_step(zero.optimizer, state.step)
    scaler = zero.loss_scaler
    if type(scaler) is type(state.loss_scaler) and getattr(scaler, "dynamic", False):
        for key in _LOSS_SCALE:
            value = getattr(state.loss_scaler, key, None)
            if not isinstance(value, int | float):
                raise UserError(f"{shards}: {key} of the loss scale is no number; use another checkpoint")
            setattr(scaler, key, value)


def masters(zero: Any) -> list[Tensor]:
    """This rank's master weights, flat, by group."""
    divided = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3 alone has it
    return zero.single_partition_of_fp32_groups if divided is None else divided


def own_parts(zero: Any, model: torch.nn.Module) -> Iterator[Part]:
    """What this rank holds, in the optimizer's order."""
    parameter: Any
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        for group, master in zip(zero.fp16_groups, masters(zero), strict=True):
            start = 0
            for parameter in group:
                size = parameter.partition_numel()
                first = size * dist.get_rank(parameter.ds_process_group)
                numel = max(0, min(size, parameter.ds_numel - first))
                weight = parameter.ds_tensor.view(-1)[:numel]
                yield Part(zero.param_names[parameter], first, numel, master, start, weight)
                start += size
        return
    for name, parameter in model.named_parameters():
        held = parameter._hp_mapping  # where DeepSpeed keeps this rank's fragment, if it has one
        if held is not None:
            master = masters(zero)[held.param_group_index]
            place, first = held.hp_fragment_address, held.lp_fragment_address.start
            yield Part(name, first, place.numel, master, place.start, held.lp_fragment)


def _read_master(state: SavedState, part: Part, saved: torch.dtype, shards: Path) -> None:
    place = part.master.narrow(0, part.start, part.numel)
    for done, values in state.read(part.name, MASTER, part.first, part.numel):
        weight = part.weight.narrow(0, done, len(values))
        if not torch.equal(weight, values.to(saved).to(weight.device, weight.dtype)):
            raise UserError(
                f"{shards}: the master weights of {part.name} are not those of the weights beside them: "
                "they belong to another run, or were saved with round_robin_gradients; use another checkpoint"
            )
        place.narrow(0, done, len(values)).copy_(values)


def _set_step(optimizer: torch.optim.Optimizer, step: float) -> None:
    """torch's optimizers count in each state, apex's in each group."""
    for moments in optimizer.state.values():
        if "step" in moments:
            moments["step"].fill_(step)
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["step"] = int(step)


@torch.no_grad()
def refresh_weights(zero: Any) -> None:
    """The weights anew from the master weights, where they were rounded to another dtype before."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()
    for weights, master in zip(zero.fp16_partitioned_groups_flat, masters(zero), strict=True):
        weights.copy_(master)
    zero.checkpoint_event_epilogue()
