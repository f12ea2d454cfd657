"""The processes of a run: the group that torchrun's variables name, under DeepSpeed's accelerator."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from aquila.training.deepspeed.uncompiled import leave_out_compiler


@contextmanager
def processes(communication: str, device: torch.device, timeout: float = 1800) -> Iterator[tuple[int, int]]:
    """The process group of this run, as (rank, world size); destroyed at the end.

    timeout: seconds that ranks wait for one another in one collective.
    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them; without
    them this process is a world of one.
    """
    # Said outright, for DeepSpeed otherwise guesses, and falls back to CPU without a word.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    quiet_libraries()
    leave_out_compiler()
    import deepspeed

    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if device.type == "cpu":
        # DeepSpeed would try compilers, and build a shared-memory collective that only its inference uses.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(
        dist_backend=communication,
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout),
    )
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def quiet_libraries() -> None:
    """Leaves errors of DeepSpeed, and drops its running commentary."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
