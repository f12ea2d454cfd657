"""What ranks send one another against arithmetic, and how fast.

`check_collectives` starts this file as a program, a process a device; each rank judges for itself, for what
goes wrong between ranks cannot be trusted to be told between ranks.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aquila.acceptance.ranks import start_ranks
from aquila.acceptance.table import Measured, Skip, Table
from aquila.backend import detect, get_backend

TIMEOUT = 300
SIZE = 1 << 16
"""Numbers that each rank gives to a collective that is checked."""
MARK = "AQUILA-COLLECTIVES "


def check_collectives(table: Table, ranks: int) -> None:
    """A line for each collective over `ranks` devices of this machine, and the rate of the largest."""
    found: dict[str, list[float]] = {}

    def run() -> Measured:
        if ranks < 2:
            raise Skip(f"{ranks} device(s) here")
        found.update(_run(ranks))
        return Measured(max(found["setup"]), unit="s", detail=f"{ranks} ranks")

    table.check("collectives", "communicator", run)
    for name in COLLECTIVES:
        table.check("collectives", name, lambda name=name: _judged(found, name))
    table.check("collectives", "all_reduce rate", lambda: _rate(found))


def _judged(found: dict[str, list[float]], name: str) -> Measured:
    if not found:
        raise Skip("no communicator")
    wrong = [str(rank) for rank, error in enumerate(found[name]) if error]
    return Measured(max(found[name]), 0, detail=f"wrong on rank {', '.join(wrong)}" if wrong else "")


def _rate(found: dict[str, list[float]]) -> Measured:
    if not found:
        raise Skip("no communicator")
    return Measured(min(found["rate"]), unit="GB/s", detail="bytes of the tensor")


def _run(ranks: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="aquila-accept-") as name:
        log = Path(name) / "log"
        process = start_ranks(ranks, ["-m", "aquila.acceptance.collectives"], Path(name), log)
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        text = log.read_text(errors="replace")
        lines = [line[line.index(MARK) + len(MARK) :] for line in text.splitlines() if MARK in line]
        if len(lines) != ranks:
            errors = [line for line in text.splitlines() if "Error" in line] or text.splitlines() or ["?"]
            raise RuntimeError(f"{len(lines)} of {ranks} ranks answered: {errors[0]}")
    answers = sorted(map(json.loads, lines), key=lambda answer: answer["rank"])
    return {key: [answer[key] for answer in answers] for key in answers[0]}


# ---- one rank --------------------------------------------------------------------------------------------
# Whole numbers small enough for fp32 to hold their sums, so that any order of adding gives the same.


def _given(rank: int, device: torch.device) -> Tensor:
    return (torch.arange(SIZE, dtype=torch.float32) % 251 + 1000 * (rank + 1)).to(device)


def _all_reduce(rank: int, world: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = _given(rank, device)
    dist.all_reduce(x)
    return x, torch.stack([_given(r, torch.device("cpu")) for r in range(world)]).sum(0)


def _all_gather(rank: int, world: int, device: torch.device) -> tuple[Tensor, Tensor]:
    out = torch.zeros(world * SIZE, device=device)
    dist.all_gather_into_tensor(out, _given(rank, device))
    return out, torch.cat([_given(r, torch.device("cpu")) for r in range(world)])


def _reduce_scatter(rank: int, world: int, device: torch.device) -> tuple[Tensor, Tensor]:
    size = SIZE // world * world
    out = torch.zeros(size // world, device=device)
    dist.reduce_scatter_tensor(out, _given(rank, device)[:size].contiguous())
    whole = torch.stack([_given(r, torch.device("cpu")) for r in range(world)]).sum(0)[:size]
    return out, whole.chunk(world)[rank]


def _broadcast(rank: int, world: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = _given(rank, device)
    dist.broadcast(x, world - 1)
    return x, _given(world - 1, torch.device("cpu"))


COLLECTIVES: dict[str, Callable[[int, int, torch.device], tuple[Tensor, Tensor]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
}


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = get_backend(detect())
    device = backend.set_device(int(os.environ["LOCAL_RANK"]))
    started = time.perf_counter()
    dist.init_process_group(backend.COMMUNICATION)
    dist.barrier()
    answer: dict[str, float] = {"rank": rank, "setup": time.perf_counter() - started}
    for name, collective in COLLECTIVES.items():
        got, wanted = collective(rank, world, device)
        answer[name] = float((got.cpu() - wanted).abs().max())
    large = torch.ones((1 << 20) if device.type == "cpu" else (64 << 20), device=device)
    for _ in range(3):
        dist.barrier()
        backend.synchronize()
        started = time.perf_counter()
        dist.all_reduce(large)
        backend.synchronize()
        took = time.perf_counter() - started
    answer["rate"] = large.numel() * 4 / took / 1e9
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
