"""A model under ZeRO-3 that is never whole on any rank: made and read back parameter by parameter."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aquila.config import EffectiveConfig
from aquila.model import AquilaModel
from aquila.model.files import TensorInfo
from aquila.model.linear import Linear
from aquila.model.weights import divide
from aquila.training.deepspeed.checkpoint_engine import to_host
from aquila.training.deepspeed.config import deepspeed_config
from aquila.training.deepspeed.ranks import on_first_rank

Fill = Callable[[str, Tensor], None]
"""Gives the tensor of that name its values."""
_BLOCK = 1 << 24


def divide_model(
    model: AquilaModel,
    open_source: Callable[[], Fill],
    effective: EffectiveConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Gives a model on device "meta" its weights; of each, a rank keeps its share alone. All ranks together.

    Rank 0 draws or reads them, one after the other, and sends each to all: besides its share a rank holds
    one parameter at a time, and a file is read once. Raises the source's `UserError` on every rank.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    for module in model.modules():
        if isinstance(module, Linear):
            module.late = True
    sources: list[Fill] = []
    on_first_rank(lambda: sources.append(open_source()))
    # Otherwise entered as a context in which modules are constructed.
    divider = Init(config_dict_or_path=deepspeed_config(effective, dist.get_world_size()), dtype=dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    # One after the other in the same place: what comes and goes would leave holes between the shares.
    place = torch.empty(max(shape.numel() for shape in shapes.values()), dtype=dtype, device=device)
    for name, shape in shapes.items():
        values = place[: shape.numel()].view(shape)
        on_first_rank(partial(_fill, sources, name, values))
        model.place(name, values)
        divider._zero_init_param(model.get_parameter(name))


@torch.no_grad()
def _fill(sources: list[Fill], name: str, values: Tensor) -> None:
    sources[0](name, values)


def weight_infos(model: torch.nn.Module) -> dict[str, TensorInfo]:
    """Name to shape and dtype of every parameter, divided or whole."""
    return {
        name: TensorInfo(tuple(getattr(p, "ds_shape", p.shape)), p.dtype)
        for name, p in model.named_parameters()
    }


def whole_parameters(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of a divided model in turn, whole while it is this one's turn. All ranks together.

    The small ones, which ZeRO-3 keeps whole between steps, stay so: its order of fetching counts on that.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    parameter: Any
    for name, parameter in model.named_parameters():
        there = parameter.ds_status == ZeroParamStatus.AVAILABLE
        with nullcontext() if there else GatheredParameters([parameter]):
            yield name, parameter.detach()


def own_weights(
    model: torch.nn.Module, rank: int, world_size: int
) -> tuple[dict[str, Tensor], list[dict[str, TensorInfo]]]:
    """Of a divided model the whole parameters that this rank is to write, in host memory, and every rank's.

    A rank holds its part of the model and one parameter. All ranks together.
    """
    parts = divide(weight_infos(model), world_size)
    mine = parts[rank] if rank < len(parts) else {}
    return {name: to_host(whole) for name, whole in whole_parameters(model) if name in mine}, parts


def share_is_altered(zero: Any) -> bool:
    """Whether this rank's share of the weights is not, bit for bit, its master weights rounded.

    Nothing else would notice: no other rank holds them. `zero` is DeepSpeed's ZeRO-3 optimizer; a share that
    is offloaded to files is not looked at.
    """
    pairs = zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
    for share, master in pairs:
        if share is None or share.numel() != master.numel():
            continue
        for part, exact in zip(share.split(_BLOCK), master.split(_BLOCK), strict=True):
            if not torch.equal(part, exact.to(part.device, part.dtype)):
                return True
    return False
