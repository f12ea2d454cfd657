"""Ranks exchange their gradients' parts: each ends with the mean of its own, rounded once."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from aquila.training.deepspeed import gradient_exchange
from aquila.training.deepspeed.gradient_exchange import Exchange, can_exchange
from aquila.training.nonfinite import GradientCheck

SIZES, PADDING, WORLD = (7, 12, 1, 40), 3, 3
PARTITION = (sum(SIZES) + PADDING) // WORLD


def gradients(rank: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    return [torch.randn(size, generator=g).bfloat16() for size in SIZES]


def run(rank: int, folder: str) -> None:
    """One rank: its parameters' gradients after the gradient_exchange, and what it saw, to a file."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    gradient_exchange.PIECE = 5  # several pieces a partition
    params = [torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in SIZES]
    for param, gradient in zip(params, gradients(rank), strict=True):
        param.grad = gradient.clone()
    if rank == 1:
        params[2].grad = None  # as of a parameter that a batch did not use
    zero = SimpleNamespace(
        dtype=torch.bfloat16,
        partition_size=[PARTITION],
        real_dp_process_group=[dist.group.WORLD],
        round_robin_bit16_groups=[params],
        round_robin_bit16_padding=[[0] * (len(SIZES) - 1) + [PADDING]],
    )
    check = GradientCheck(torch.device("cpu"))
    Exchange(zero, check)()
    torch.save(([param.grad for param in params], check.total), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_each_part_is_the_mean_rounded_once(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=WORLD)
    given = [gradients(rank) for rank in range(WORLD)]
    given[1][2] = torch.zeros(SIZES[2], dtype=torch.bfloat16)
    mean = torch.stack([torch.cat(each).float() for each in given]).sum(0).div(WORLD).bfloat16()
    for rank in range(WORLD):
        found, total = torch.load(tmp_path / f"{rank}.pt")
        own = slice(rank * PARTITION, (rank + 1) * PARTITION)
        assert torch.equal(torch.cat(found)[own], mean[own])
        assert total.item() == pytest.approx(torch.cat(given[rank]).float().sum().item(), abs=0.2)


def test_other_ways_of_averaging_are_left_to_deepspeed() -> None:
    plain = {
        "postscale_gradients": True,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": torch.bfloat16,
        "dtype": torch.bfloat16,
        "device": "cpu",
    }
    assert can_exchange(SimpleNamespace(**plain))
    for other in (
        {"postscale_gradients": False},
        {"gradient_predivide_factor": 2.0},
        {"communication_data_type": torch.float32},
        {"device": "cuda"},
    ):
        assert not can_exchange(SimpleNamespace(**plain | other))
