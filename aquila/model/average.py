"""The weighted mean of several models' weights, one parameter in memory at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from aquila.config import ModelConfig
from aquila.core.errors import UserError
from aquila.model import AquilaModel
from aquila.model.files import TensorInfo
from aquila.model.weights import Weights, check_names, load_config, write_sharded


def ema_shares(members: int, decay: float) -> list[float]:
    """The shares that an exponential moving average a <- decay a + (1 - decay) w gives, oldest first."""
    shares = [(1 - decay) * decay ** (members - 1 - number) for number in range(members)]
    return [decay ** (members - 1), *shares[1:]]


def check_alike(members: Sequence[Path]) -> ModelConfig:
    """The configuration of the last member. Raises `UserError` for one of another shape or function."""
    configs = [load_config(member) for member in members]
    last = configs[-1]
    for member, config in zip(members, configs, strict=True):
        if _shapes(config) != _shapes(last) or config.function() != last.function():
            raise UserError(
                f"{member} is another model than {members[-1]}: their config.json differ in what counts"
            )
    return last


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in AquilaModel(config, device="meta").named_parameters()}


def write_average(
    members: Sequence[Path],
    shares: Sequence[float],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes sum(share * member) to `folder` as safetensors, summed in fp64, in the last member's dtype.

    Raises `UserError` for members that are not alike or not whole.
    """
    config = check_alike(members)
    shapes, stores = _shapes(config), [Weights(member, config) for member in members]
    for store in stores:
        check_names(shapes, store.found(config), str(store.path))
    infos = {name: TensorInfo(shape, dtype or stores[-1].info[name].dtype) for name, shape in shapes.items()}

    def produce(name: str) -> Tensor:
        total = torch.zeros(shapes[name], dtype=torch.float64)
        for store, share in zip(stores, shares, strict=True):
            total.add_(store.read(name).double(), alpha=share)
        return total.to(infos[name].dtype)

    write_sharded(folder, infos, produce, max_shard_bytes)
